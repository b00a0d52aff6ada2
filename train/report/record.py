"""What a run's folder holds; what is missing or damaged is said in a sentence instead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from jaxsteer.io import SteeringFile, load_steering
from jaxsteer.io.files import read_json
from train.display.failures import sentence_of
from train.evaluation.answers import ScoredAnswer, read_answers
from train.report.words import interval, number, share
from train.run.folder import RunFolder, read_history, read_inputs
from train.run.lofit import STAGES
from train.run.metrics import read_metrics
from train.run.starts import read_starts

T = TypeVar("T")


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers, with the ends of its 95 % interval, and the number of examples."""

    value: float
    interval: tuple[float, float]
    examples: int | None = None

    def __str__(self) -> str:
        """E.g. "80.0 % (70.0 to 90.0)"."""
        return f"{share(self.value)} ({interval(self.interval)})"


@dataclass(frozen=True)
class Summary:
    """Figures of a finished run; NaN and None where it does not have one.

    before, after  accuracy on the test examples
    losses         split -> stage ("before", "after") -> figure -> value
    trainable      number of trained parameters
    share          of the base's parameters
    seconds, waited  of training, and of waiting for data in it
    speed          tokens per second
    memory         peak, in bytes
    step           whose state is kept
    finished       when, as ISO 8601
    """

    before: Accuracy | None
    after: Accuracy | None
    losses: dict[str, dict[str, dict[str, float]]]
    trainable: int
    share: float
    seconds: float
    waited: float
    speed: float
    memory: float
    step: int | None
    finished: str | None


@dataclass
class Record:
    """A run, as its folder shows it.

    run         the folder
    name        for headings and legends
    config      the settings
    rows        lines of metrics.jsonl
    summary     None: the run has not finished
    inputs, starts, history  what it read, when it was started, which settings were changed
    steering    None: there is no steering file, or none that can be read
    before, after  test answers; [] if there are none
    during      lines of answers_during.jsonl
    evaluations accuracies that `jaxsteer evaluate` found, by what was evaluated
    problems    sentences on what is missing or damaged
    """

    run: RunFolder
    name: str
    config: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: Summary | None = None
    inputs: dict[str, Any] = field(default_factory=dict)
    starts: list[dict[str, Any]] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    steering: SteeringFile | None = None
    before: list[ScoredAnswer] = field(default_factory=list)
    after: list[ScoredAnswer] = field(default_factory=list)
    during: list[dict[str, Any]] = field(default_factory=list)
    evaluations: dict[str, Accuracy] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Lines of training steps, without those of evaluations."""
        return [row for row in self.rows if "loss" in row]

    @property
    def done(self) -> int:
        """Number of steps done."""
        return max((row["step"] for row in self.steps), default=0)

    @property
    def planned(self) -> int | None:
        """Number of steps that the run was to do, if it is known."""
        known = [self.starts[-1].get("steps") if self.starts else None, self.config.get("steps")]
        return next((steps for steps in known if isinstance(steps, int)), None)

    def attempt(self, what: str | Path, read: Callable[[], T]) -> T | None:
        """What `read` returns; None where it fails because of what the folder holds, and a sentence is kept.

        Args:
            what: the file, or the part of the page, for the sentence.
            read: reads it.
        """
        try:
            return read()
        except (ValueError, OSError) as error:
            self.problems.append(_named(what, sentence_of(error) or str(error)))
        except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
            self.problems.append(f"{what}: not what this version of jaxsteer writes ({type(error).__name__}: {error})")
        return None


def _named(what: str | Path, sentence: str) -> str:
    return sentence if str(what) in sentence else f"{what}: {sentence}"


def find_runs(paths: Sequence[str]) -> list[Path]:
    """The folders of runs that paths name; that of LoFiT is its two runs.

    Raises:
        ValueError: a path is no run's folder.
    """
    found = [run for path in paths for run in _runs_in(Path(path))]
    if twice := [str(path) for path in found if sum(path.resolve() == other.resolve() for other in found) > 1]:
        raise ValueError(f"{twice[0]}: given twice")
    return found


def _runs_in(folder: Path) -> list[Path]:
    if folder.is_file() and folder.name == RunFolder(folder.parent).steering.name:
        folder = folder.parent
    if not folder.exists():
        raise ValueError(f"{folder}: no such folder; give that of a run, such as runs/quickstart")
    if not RunFolder(folder).config.is_file():
        if inside := sorted(str(each) for each in folder.glob("*/") if RunFolder(each).config.is_file()):
            raise ValueError(f"{folder}: holds runs but is none itself; give some of {', '.join(inside)}")
        raise ValueError(f"{folder}: not a run (it has no config.json); give a folder of `jaxsteer sft`")
    settings = read_json(RunFolder(folder).config)
    if "run" in settings:
        stages = [folder / stage for stage in STAGES if RunFolder(folder / stage).config.is_file()]
        if not stages:
            raise ValueError(f"{folder}: neither of its two runs ({', '.join(STAGES)}) has started")
        return stages
    if "plan" not in settings:
        raise ValueError(
            f"{folder}: not a run (its config.json has no plan); give a folder that `jaxsteer sft` has made"
        )
    return [folder]


def read_record(folder: Path, name: str) -> Record:
    """Read a run's folder.

    Args:
        folder: one of `find_runs`.
        name: of the run on the page.

    Raises:
        ValueError: its config.json is damaged.
    """
    run = RunFolder(folder)
    record = Record(run, name, read_json(run.config))
    attempt = record.attempt
    if run.metrics.exists():
        record.rows = attempt(run.metrics, lambda: read_metrics(run.metrics)) or []
    else:
        record.problems.append(f"{run.metrics}: is missing, so there are no curves")
    record.inputs = attempt(run.inputs, lambda: read_inputs(run)) or {}
    record.history = attempt(run.history, lambda: read_history(run)) or []
    record.starts = attempt(run.starts, lambda: read_starts(run)) or []
    if run.summary.exists():
        record.summary = attempt(run.summary, lambda: _summary(read_json(run.summary)))
    if run.steering.exists():
        record.steering = attempt(run.steering, lambda: load_steering(run.steering))
    elif run.summary.exists() and record.config["plan"]:
        record.problems.append(f"{run.steering}: is missing")
    for path, answers in ((run.answers_before, record.before), (run.answers_after, record.after)):
        if path.exists():
            answers += attempt(path, partial(read_answers, path)) or []
    if run.answers_during.exists():
        record.during = attempt(run.answers_during, lambda: read_metrics(run.answers_during)) or []
    evaluated = folder / "evaluation" / "summary.json"
    if evaluated.exists():
        record.evaluations = attempt(evaluated, lambda: _evaluations(read_json(evaluated))) or {}
    return record


def _summary(data: dict[str, Any]) -> Summary:
    losses = {split: data[split] for split in ("test", "validation") if split in data}
    return Summary(
        before=_accuracy(data.get("accuracy_before")),
        after=_accuracy(data.get("accuracy_after")),
        losses={
            split: {stage: {name: number(value) for name, value in stages[stage].items()} for stage in stages}
            for split, stages in losses.items()
        },
        trainable=int(data["trainable_parameters"]),
        share=number(data["trainable_share"]),
        seconds=number(data.get("seconds")),
        waited=number(data.get("data_wait_seconds")),
        speed=number(data.get("tokens_per_second")),
        memory=number(data.get("peak_memory_bytes")),
        step=data.get("step"),
        finished=data.get("finished"),
    )


def _accuracy(data: Any) -> Accuracy | None:
    if data is None:
        return None
    low, high = data["interval"]
    return Accuracy(float(data.get("value", data.get("accuracy"))), (float(low), float(high)), data.get("examples"))


def _evaluations(data: dict[str, Any]) -> dict[str, Accuracy]:
    """What was evaluated, with how it was asked, and its accuracy."""
    asked = [f"{data['examples']} {data['split']} examples"]
    asked += [f"perturbed ({data['perturbed']})"] if data.get("perturbed") else []
    asked += [f"strength {data['strength']}"] if data.get("strength") else []
    return {
        f"{name}, {', '.join(asked)}": found
        for name, value in data.items()
        if isinstance(value, dict) and "accuracy" in value and (found := _accuracy(value))
    }
