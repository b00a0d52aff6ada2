"""What commands share: config files, command lines, the choice of a task, and how errors are reported."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from jaxsteer.plans import did_you_mean
from train.base_models import run_settings
from train.config import TrainConfig
from train.tasks import JsonlTask, Task, on_file, task_from_json

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
    hint = did_you_mean(stem, shipped)
    known = ", ".join(sorted(shipped))
    raise ValueError(f"{name}: no such config file, and none of the configs shipped here{hint}: {known}")


def load_config_file(name: str | Path, kind: type[T]) -> T:
    """Call `config()` of a Python file, which may import its neighbours as a script may.

    Args:
        name: a path or a shipped config's name, see `find_config_file`.
        kind: the class of the settings that the file must return.

    Raises:
        ValueError: no such file, or it does not define `config()` of this kind.
    """
    path = find_config_file(name)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    built = module.config() if hasattr(module, "config") else None
    if not isinstance(built, kind):
        raise ValueError(f"{path}: must define `def config() -> {kind.__name__}`")
    return built


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
    """Run a command; an error that the user can fix is printed as one sentence on stderr, with exit status 1."""
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        from rich.console import Console
        from rich.text import Text

        message = str(error)
        if isinstance(error, OSError) and error.filename is not None:  # without "[Errno 2]"
            message = f"{error.filename}: {error.strerror}"
        Console(stderr=True).print(Text("error: ", style="bold red").append(Text(message, style="not bold default")))
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def find_task(config: str | None, data: str | None, notes: Mapping[str, Any]) -> Task:
    """The task to evaluate: a config file's, else the one a steering file was trained on.

    Args:
        config: path or name of a config file (--config).
        data: path of a data file to read instead of the task's own data (--data).
        notes: of the steering file.

    Raises:
        ValueError: nothing says what the task is.
    """
    task = load_config_file(config, TrainConfig).task if config else None
    settings = run_settings(notes)
    if task is None and isinstance(settings.get("task"), dict):
        task = task_from_json(settings["task"])
    if data is not None:
        return JsonlTask(data, data) if task is None else on_file(task, data)
    if task is None:
        raise ValueError(
            "which examples? Give --config or --data: the steering file does not say what it was trained on"
        )
    return task
