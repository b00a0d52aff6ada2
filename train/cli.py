"""Command lines: config files, overrides, and how errors reach the person at the keyboard."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import tyro

from train.config import TrainConfig
from train.evaluate import EvaluateConfig
from train.tasks import JsonlTask, Task, on_file, task_from_json

T = TypeVar("T")


C = TypeVar("C", bound=TrainConfig)


def load_config_file(path: str | Path, kind: type[T]) -> T:
    """Call `config()` of a Python file.

    Raises:
        ValueError: no such file, or it does not define `config()` of this kind.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such config file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    built = module.config() if hasattr(module, "config") else None
    if not isinstance(built, kind):
        raise ValueError(f"{path}: must define `def config() -> {kind.__name__}`")
    return built


def from_command_line(program: str, description: str, kind: type[C], argv: list[str] | None = None) -> C:
    """`[config.py] [--key value ...]`: a config file's settings (or the defaults), then overrides.

    Args:
        kind: TrainConfig, or one with settings of its own besides; a config file sets the common ones.
    """
    argv = sys.argv[1:] if argv is None else argv
    common = TrainConfig()
    if argv and not argv[0].startswith("-"):
        common, argv = load_config_file(argv[0], TrainConfig), argv[1:]
    default = kind(**{each.name: getattr(common, each.name) for each in dataclasses.fields(TrainConfig)})
    return tyro.cli(
        tyro.conf.AvoidSubcommands[kind],  # type: ignore[valid-type, misc]
        prog=f"python -m train.{program}",
        args=argv,
        default=default,
        description=description + "\n\nThe first argument may be a config file, e.g. configs/listops_smollm2.py; "
        "what follows overrides it.",
    )


def run_main(main: Callable[[], None]) -> None:
    """Run a program; an error that is the user's to mend is one sentence on stderr, exit status 1."""
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        from rich.console import Console
        from rich.text import Text

        Console(stderr=True).print(Text("error: ", style="bold red").append(Text(str(error), style="not bold default")))
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def find_task(config: EvaluateConfig, notes: dict) -> Task:
    """The task to evaluate: of --config, of --data, or the one that the steering was trained on.

    Raises:
        ValueError: none of the three is at hand.
    """
    task = load_config_file(config.config, TrainConfig).task if config.config else None
    if task is None and "config" in notes:
        task = task_from_json(notes["config"]["task"])
    if config.data is not None:
        return JsonlTask(config.data, config.data) if task is None else on_file(task, config.data)
    if task is None:
        raise ValueError(
            "which examples? Give --config or --data: the steering file does not say what it was trained on"
        )
    return task
