"""What commands share: config files, command lines, the choice of a task, and how errors are reported."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable, Mapping
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from train.base_models import run_settings
from train.config import TrainConfig
from train.devices import interrupts
from train.display.failures import close_output, flush, make_printable, report, sentence_of
from train.tasks import AnyTask, HeldOutTask, JsonlTask, on_file, task_from_json

T = TypeVar("T")

Run = Annotated[TrainConfig, tyro.conf.arg(name="")]
"""A run's settings as a part of a command's; on the command line they have no prefix."""

_HERE = Path(__file__).resolve().parent
CONFIGS = next((f for f in (_HERE / "configs", _HERE.parent / "configs") if f.is_dir()), _HERE / "configs")
"""The configs that come with jaxsteer: in this package where it is installed, beside it in a clone."""


def find_config_file(name: str | Path) -> Path:
    """A config file: a path, or the name of one that comes with jaxsteer ("listops_smollm2").

    "configs/listops_smollm2.py", its path in a clone, is a name too where there is no such file.

    Raises:
        ValueError: there is neither such a file nor such a name.
    """
    shipped = {path.stem: path for path in CONFIGS.glob("*.py") if path.stem != "common"}
    path = Path(name)
    if path.is_file():
        return path
    stem = path.stem if path.parent == Path("configs") and path.suffix == ".py" else str(name)
    if stem in shipped:
        return shipped[stem]
    raise ValueError(f"{name}: no such config file, and none of the configs shipped here: {', '.join(sorted(shipped))}")


def load_config_file(name: str | Path, kind: type[T]) -> T:
    """Call `config()` of a Python file, which may import its neighbours as a script may.

    Args:
        name: a path or a shipped config's name, see `find_config_file`.
        kind: the class of the settings that the file must return.

    Raises:
        ValueError: no such file, or it does not define `config()` of this kind.
    """
    path = find_config_file(name)
    built = _config_of(path)
    if not isinstance(built, kind):
        raise ValueError(f"{path}: must define `def config() -> {kind.__name__}`")
    return built


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
        return f"{path}: not a config file; configs are Python files (*.py) that define `def config() -> TrainConfig`"
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: {error.msg}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    where = f"{path}:{lines[-1]}" if lines else str(path)
    message = sentence_of(error) if isinstance(error, (ValueError, OSError, ImportError)) else None
    return f"{where}: {message or f'{type(error).__name__}: {error}'}"


def from_command_line(program: str, description: str, kind: type[T], argv: list[str] | None = None) -> T:
    """Read `[CONFIG] [--key value ...]`: the settings of a config file (or the defaults), then overrides.

    Args:
        program: the command's name, for its help.
        description: what it does, for its help.
        kind: TrainConfig, or a dataclass with a field `run: Run` besides settings of its own.
        argv: the arguments; by default those of the process.

    Raises:
        ValueError: no such config file, or settings that no run could have.
    """
    argv = sys.argv[1:] if argv is None else argv
    run = TrainConfig()
    if argv and not argv[0].startswith("-"):
        run, argv = load_config_file(argv[0], TrainConfig), argv[1:]
    default: Any = run if kind is TrainConfig else kind(run=run)  # type: ignore[call-arg]
    return tyro.cli(
        tyro.conf.AvoidSubcommands[kind],  # type: ignore[valid-type, misc]
        prog=f"python -m train.{program} [CONFIG]",
        args=argv,
        default=default,
        description=f"{description.strip()}\n\nCONFIG: a config file or the name of one that comes with jaxsteer, e.g. "
        "configs/listops_smollm2.py or listops_smollm2; the options override it.",
    )


def run_main(main: Callable[[], None]) -> None:
    """Run a command, and end the process as a user expects whatever happens.

    An error that the user can fix is printed as one sentence on stderr, with exit status 1. A bug of jaxsteer's own is
    named as one: its traceback goes to a file, with exit status 70. Ctrl-C ends with 130, see
    `train.devices.interrupts`.
    """
    make_printable()
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
    task, settings = run.task if run else None, run_settings(notes)
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
