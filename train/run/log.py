"""Everything that a training run reports while it runs: metrics, trackers, traces, timing and the progress bar."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import jax
import numpy as np

from jaxsteer.optim import learning_rates
from jaxsteer.training import TrainState
from train.config import TrainConfig
from train.devices.machine import peak_flops
from train.devices.processes import is_first, on_first
from train.display.console import progress
from train.evaluation.answers import ScoredAnswer
from train.evaluation.evaluator import Validation
from train.run.figures import described
from train.run.folder import RunFolder
from train.run.metrics import MetricsWriter, read_metrics
from train.run.profiling import Profiler
from train.run.trackers import open_trackers
from train.run.training import Training
from train.run.watch import StepTimer


class RunLog:
    """The reports of one run. A context manager.

    Args:
        config: the run.
        run: its folder.
        training: its parts.
        start: number of steps done before; 0 for a new run.
        resumed: whether the run's folder may hold lines of an earlier start.
    """

    def __init__(self, config: TrainConfig, run: RunFolder, training: Training, start: int, *, resumed: bool) -> None:
        self._config, self._run, self._training, self._start = config, run, training, start
        self._resume_from = (start + 1 if start else 0) if resumed else None
        self.history: list[dict[str, Any]] = []
        """Earlier lines of a resumed run that hold an evaluation or a number of skipped steps."""
        self._answered: dict[str, str] = {}  # the last answer to each validation question shown, by its source
        peak = peak_flops(training.program.mesh, training.loaded.base["embed"]["embedding"].dtype)
        self.timer = StepTimer(training.flops, peak)

    def __enter__(self) -> RunLog:
        """Open everything; a failure half-way closes what is open."""
        config, run = self._config, self._run
        with ExitStack() as opened:
            self._profiler = opened.enter_context(
                Profiler(config.profile, run.profile, self._start, self._training.steps)
            )
            kinds = config.track if is_first() else ()
            trackers = open_trackers(kinds, run.folder, config.to_json(), resume_from=self._resume_from)
            path = run.metrics if is_first() else None
            self._writer = opened.enter_context(MetricsWriter(path, resume_from=self._resume_from, trackers=trackers))
            path = self._run.answers_during if is_first() else None
            self._answers = opened.enter_context(MetricsWriter(path, resume_from=self._resume_from))
            if path is not None and path.exists():
                self._answered = {row["source"]: row["output"] for row in read_metrics(path)}
            self.history = on_first(self._read_history)
            bar = progress(self._training.steps, "Training", start=self._start)
            self._bar = opened.enter_context(bar)
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        """Close everything."""
        self._opened.__exit__(*error)

    @contextmanager
    def timed(self, done: int) -> Iterator[None]:
        """Time a step (from 1), and start its trace if one was asked for."""
        self._profiler.before(done)
        with self.timer.step():
            yield

    def step(self, done: int, state: TrainState, values: Mapping[str, Any], *, skipped: int = 0) -> None:
        """Report a step.

        Args:
            done: the step, counted from 1.
            state: after it.
            values: its metrics, see `train.run.training.to_floats`, and the examples of a step that was not finite.
            skipped: steps skipped so far, if any.
        """
        rates = self.timer.rates(values)
        updates = done - 1 - skipped + bool(skipped and "examples" in values)  # a skipped step counts from the next on
        counted = {"skipped": skipped} if skipped else {}
        self._writer.write(done, **values, **self._learning_rates(updates), **rates, **counted)
        self._bar.update(done, **_shown(values, rates), **counted)
        if message := self._profiler.after(done, state):
            self.note(message)

    def evaluation(self, done: int, validation: Validation) -> None:
        """Report an evaluation after a step; 0 is the pretrained model."""
        self._writer.write(done, **validation.results)
        self.note(f"step {done}: {described(validation.results)}")
        for answer in validation.answers:
            before = self._answered.get(answer.source)
            self.note(f"    {described_answer(answer, before)}")
            self._answers.write(done, **_answer_line(answer))
            self._answered[answer.source] = answer.output

    def note(self, text: str) -> None:
        """Print a line above the progress bar."""
        self._bar.note(text)

    def _learning_rates(self, updates: int) -> dict[str, float]:
        """The learning rate of each group that trains, after this many updates."""
        trained = set(jax.tree.leaves(self._training.program.labels))
        rates = learning_rates(self._config.optim, max(0, updates), self._training.steps)
        return {f"lr_{group}": float(rate) for group, rate in rates.items() if group in trained}

    def _read_history(self) -> list[dict[str, Any]]:
        rows = read_metrics(self._run.metrics) if self._start and self._run.metrics.exists() else []
        return [row for row in rows if self._config.select_by in row or "skipped" in row]


def _shown(values: Mapping[str, Any], rates: Mapping[str, float]) -> dict[str, float]:
    """What the progress bar shows of a step."""
    overlap = {"overlap": float(np.mean(values["overlap"]))} if "overlap" in values else {}
    shown = {name: rate for name, rate in rates.items() if name != "step_seconds"}
    # The loss of rollouts is about 0 whatever is learned: advantages add up to 0.
    names = ("reward", "answer_length") if "reward" in values else ("loss",)
    return {name: values[name] for name in (*names, "grad_norm")} | overlap | shown


def described_answer(answer: ScoredAnswer, before: str | None) -> str:
    """An answer on one line, with the one before where it is another, and the right one where this is wrong."""
    notes = [] if before in (None, answer.output) else [f"before: {_short(before or '', 40)}"]
    if answer.gold is not None and not answer.correct:
        notes.append(f"reference: {_short(answer.gold, 40)}")
    more = f"  ({', '.join(notes)})" if notes else ""
    return f"{_short(answer.prompt, -48)} -> {_short(answer.output, 60)}{more}"


def _short(text: str, width: int) -> str:
    """A text on one line: its beginning, or its end if the width is negative."""
    line = " ".join(text.split())
    if len(line) <= abs(width):
        return f"“{line}”"
    return f"“{line[: width - 1]}…”" if width > 0 else f"“…{line[width + 1 :]}”"


def _answer_line(answer: ScoredAnswer) -> dict[str, Any]:
    names = ("source", "prompt", "output", "gold", "correct", "truncated")
    return {name: getattr(answer, name) for name in names}
