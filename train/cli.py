"""What commands share: config files, command lines, the choice of a task, and how errors are reported."""

from __future__ import annotations

import importlib.util
import sys
import traceback
import typing
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import tyro

from jaxsteer.io.files import read_json
from jaxsteer.io.provenance import training_settings
from jaxsteer.plans import did_you_mean
from train.config import TrainConfig, parse_run, plain_run
from train.devices import interrupts
from train.display.failures import close_output, flush, make_printable, report, sentence_of
from train.plain import from_plain, to_plain
from train.tasks import AnyTask, HeldOutTask, JsonlTask, on_file, task_from_json

T = TypeVar("T")

R = TypeVar("R", bound=TrainConfig)

Run = Annotated[R, tyro.conf.arg(name="")]
"""A run's settings as a part of a command's; on the command line they have no prefix."""

_HERE = Path(__file__).resolve().parent
CONFIGS = next((f for f in (_HERE / "configs", _HERE.parent / "configs") if f.is_dir()), _HERE / "configs")
"""The configs that come with jaxsteer: in this package where it is installed, beside it in a clone."""


def find_config_file(name: str | Path) -> Path:
    """A config file (.py, .yaml, .json): a path, or the name of one that comes with jaxsteer ("listops_smollm2").

    "configs/listops_smollm2.py", its path in a clone, is a name too where there is no such file.

    Raises:
        ValueError: there is neither such a file nor such a name.
    """
    shipped = {path.stem: path for path in CONFIGS.glob("*.py") if not path.stem.startswith("common")}
    path = Path(name)
    if path.is_file():
        return path
    stem = path.stem if path.parent == Path("configs") and path.suffix == ".py" else str(name)
    if stem in shipped:
        return shipped[stem]
    hint = did_you_mean(stem, shipped)
    known = ", ".join(sorted(shipped))
    raise ValueError(f"{name}: no such config file, and none of the configs shipped here{hint}: {known}")


def load_config_file(name: str | Path, kind: type[T]) -> T:
    """Read the settings in a YAML or JSON file, or call `config()` of a Python file, which may import its neighbours.

    Args:
        name: a path or a shipped config's name, see `find_config_file`.
        kind: the class of the settings that the file must hold or return.

    Raises:
        ValueError: no such file, or it does not define settings of this kind.
    """
    path = find_config_file(name)
    if path.suffix.lower() in (".yaml", ".yml", ".json"):
        plain, where = read_yaml(path), str(path)
        built: Any = parse_run(plain, where) if issubclass(kind, TrainConfig) else from_plain(kind, plain, where)
    else:
        built = _config_of(path)
    if isinstance(built, kind):
        return built
    if isinstance(built, TrainConfig):
        asked = f" ({kind.__name__})" if not issubclass(kind, TrainConfig) else f", not of jaxsteer {kind.program}"
        raise ValueError(f"{path}: holds the settings of jaxsteer {built.program}{asked}")
    raise ValueError(f"{path}: must define `def config() -> {kind.__name__}`")


def read_yaml(path: Path) -> Any:
    """The value in a YAML file (JSON is YAML too).

    Raises:
        ValueError: naming the file and, if possible, the line: not UTF-8, or not YAML.
    """
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path}{line}: not YAML ({error.problem})") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ValueError(f"{path}: not YAML ({str(error).splitlines()[0]})") from None


def _config_of(path: Path) -> Any:
    """What a Python file's `config()` returns; None if it defines none.

    Raises:
        ValueError: not a Python file, or an error in it, with its line.
    """
    spec = importlib.util.spec_from_loader(path.stem, SourceFileLoader(path.stem, str(path)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "config") and path.suffix != ".py":  # one line of JSON is Python too
            raise ValueError("no config")
        return module.config() if hasattr(module, "config") else None
    except Exception as error:
        raise ValueError(_in_config(path, error)) from None
    finally:
        sys.path.pop(0)


def _in_config(path: Path, error: Exception) -> str:
    """An error of a config file in words, with the line of the file that raised it."""
    if path.suffix != ".py":
        return (
            f"{path}: not a config file; configs are Python files (*.py) that define `def config() -> TrainConfig`, or "
            "YAML files (*.yaml)"
        )
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: {error.msg}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    where = f"{path}:{lines[-1]}" if lines else str(path)
    message = sentence_of(error) if isinstance(error, (ValueError, OSError, ImportError)) else None
    return f"{where}: {message or f'{type(error).__name__}: {error}'}"


def from_command_line(program: str, description: str, kind: type[T], argv: list[str] | None = None) -> T:
    """Read `[CONFIG] [--key value ...]`: the settings of a config file (or the defaults), then overrides.

    Without CONFIG, `--resume --out FOLDER` begins with the settings in that folder. `--print-config` prints the result
    and ends the command.

    Args:
        program: the command's name, for its help.
        description: what it does, for its help.
        kind: TrainConfig, or a dataclass with a field `run: Run[TrainConfig]` (or of a kind of it) besides its own.
        argv: the arguments; by default those of the process.

    Raises:
        ValueError: no such config file, or settings that no run could have.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if print_only := "--print-config" in argv:
        argv.remove("--print-config")
    default = _of_resumed(kind, argv)
    if argv and not argv[0].startswith("-"):
        default, argv = _with_run(kind, _settings_for(kind, argv[0])), argv[1:]
    settings = tyro.cli(
        tyro.conf.AvoidSubcommands[kind],  # type: ignore[valid-type, misc]
        prog=f"python -m train.{program} [CONFIG]",
        args=argv,
        default=default,
        description=f"{description.strip()}\n\nCONFIG: a config file (.py, .yaml) or the name of one that comes with "
        "jaxsteer, e.g. configs/listops_smollm2.py or listops_smollm2; the options override it. --print-config prints "
        "the settings that come of both, as YAML that can be a CONFIG, and does nothing else.",
    )
    if print_only:
        print_settings(settings if isinstance(settings, TrainConfig) else settings.run)
    return settings


def print_settings(settings: Any) -> NoReturn:
    """Print settings as YAML, and end the command."""
    import yaml

    plain = plain_run(settings) if isinstance(settings, TrainConfig) else to_plain(settings)
    print(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=120), end="")
    raise SystemExit(0)


def _run_kind(kind: type[Any]) -> type[TrainConfig]:
    """The class of the run's settings in a command's."""
    return kind if issubclass(kind, TrainConfig) else typing.get_type_hints(kind)["run"]


def _settings_for(kind: type[Any], name: str) -> TrainConfig:
    """The settings of a run in a config file, which must be those of this command: another would learn otherwise."""
    wanted = _run_kind(kind)
    settings = load_config_file(name, wanted)
    if settings.program != wanted.program:
        raise ValueError(f"{name}: holds the settings of jaxsteer {settings.program}, not of jaxsteer {wanted.program}")
    return settings


def _with_run(kind: type[T], run: TrainConfig) -> T:
    """A command's settings around those of a run."""
    return run if issubclass(kind, TrainConfig) else kind(run=run)  # type: ignore[call-arg, return-value]


def _of_resumed(kind: type[T], argv: Sequence[str]) -> T:
    """The settings in the folder of a run that is resumed without a config file; else the defaults."""
    default = _with_run(kind, _run_kind(kind)())
    names = [text.partition("=")[0].replace("_", "-") for text in argv]
    if "--resume" not in names or (argv and not argv[0].startswith("-")):
        return default
    given = [at for at, name in enumerate(names) if name == "--out"]
    out = _run_kind(kind).out
    if given:
        _, equals, value = argv[given[-1]].partition("=")
        out = value if equals else next(iter(argv[given[-1] + 1 :]), out)
    file = Path(out) / "config.json"
    if not file.is_file():
        return default  # the run says what is wrong
    data = read_json(file)
    if "run" in data:
        return from_plain(kind, data, str(file))
    stored = parse_run(data, str(file))
    if stored.program != _run_kind(kind).program:
        raise ValueError(f"{out}: is a run of jaxsteer {stored.program}; resume it with that command")
    return _with_run(kind, stored)


def run_main(main: Callable[[], None]) -> None:
    """Run a command, and end the process as a user expects whatever happens.

    An error that the user can fix is printed as one sentence on stderr, with exit status 1. A bug of jaxsteer's own is
    named as one: its traceback goes to a file, with exit status 70. Ctrl-C ends with 130, see
    `train.devices.interrupts`.
    """
    make_printable()
    if main.__module__ == "__main__":
        interrupts.last()
    with interrupts.handling():
        try:
            main()
            flush()
        except interrupts.Interrupted as stop:
            print(f"{stop} Give the same command again to continue.".strip(), file=sys.stderr)
            interrupts.leave(interrupts.STOPPED)
        except KeyboardInterrupt:
            raise SystemExit(interrupts.STOPPED) from None
        except BrokenPipeError:  # the reader, such as head, has what it wanted
            raise SystemExit(close_output()) from None
        except Exception as error:
            raise SystemExit(report(error)) from None


def find_task(config: str | None, data: str | None, notes: Mapping[str, Any]) -> AnyTask:
    """The task to evaluate: a config file's, else the one a steering file was trained on.

    Args:
        config: path or name of a config file (--config).
        data: path of a data file to read instead of the task's own data (--data).
        notes: of the steering file.

    Raises:
        ValueError: nothing says what the task is.
    """
    run = load_config_file(config, TrainConfig) if config else None
    task, settings = run.task if run else None, training_settings(notes)
    share = run.validation_share if run else settings.get("validation_share", 0.0)
    if task is None and isinstance(settings.get("task"), dict):
        task = task_from_json(settings["task"])
    if task is not None and data is None and share:
        return HeldOutTask(task, share)
    if data is not None:
        return JsonlTask(data, data) if task is None else on_file(task, data)
    if task is None:
        raise ValueError(
            "which examples? Give --config or --data: the steering file does not say what it was trained on"
        )
    return task
