"""The curves of runs: losses, accuracy, learning rates, gradients, speed, and the overlap of joint plans."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import matplotlib.image
import numpy as np

from jaxsteer.orthogonality import Orthogonality, chance_overlap, joint_layers
from train.config import KINDS, program_of
from train.display.plots import smooth
from train.report.chart import COLORS, Chart, Drawing, Heat, Level, Series, draw, is_drawable
from train.report.record import Record
from train.report.words import number

FEW = 20
"""Curves of fewer steps are not smoothed."""

MOST_COLUMNS = 240
"""Maximum number of columns in the picture of an overlap."""


class Curve(NamedTuple):
    """One chart, and how to get its values from a line of metrics.

    title, unit   of the values
    of            a training step's value
    validation    name of an evaluation's figure that is drawn with it
    level         of one run: a line to compare with
    log, percent  see `Chart`
    warm          whether first steps, which compile, are left out
    often_zero    whether there is no chart where all values are 0
    sparse        whether only some steps have a value
    programs      the commands of whose runs it is drawn; () = all
    """

    title: str
    unit: str
    of: Callable[[dict[str, Any]], float] | None = None
    validation: str | None = None
    level: Callable[[Record], Level | None] = lambda record: None
    log: bool = False
    percent: bool = False
    warm: bool = False
    often_zero: bool = False
    sparse: bool = False
    programs: tuple[str, ...] = ()


def _clip(record: Record) -> Level | None:
    clip = record.config.get("optim", {}).get("clip")
    return Level(clip, f"clipped to {clip:g}") if isinstance(clip, int | float) and clip else None


def _of(name: str) -> Callable[[dict[str, Any]], float]:
    return lambda row: number(row.get(name))


ROLLOUTS = (
    Curve("Reward", "mean over the answers of a batch of rollouts", _of("reward")),
    Curve("Spread of rewards", "standard deviation within a group, the mean", _of("reward_spread")),
    Curve("Length of answers", "tokens, the end included", _of("answer_length")),
    Curve("Truncated answers", "share of the answers", _of("truncated"), percent=True, often_zero=True),
    Curve("Groups of equal rewards", "share, from which nothing is learned", _of("equal_groups"), percent=True),
    Curve("Entropy", "estimate, nats per token, at temperature 1", _of("entropy")),
    Curve("KL to the reference", "estimate, nats per token", _of("kl"), sparse=True),
    Curve("Clipped tokens", "share of the tokens", _of("clip_share"), percent=True, often_zero=True),
)
"""Charts for GRPO runs."""

PREFERENCES = (
    Curve("Pairs right", "share whose margin is above 0", _of("pair_accuracy"), "pair_accuracy", percent=True),
    Curve("Margin", "scaled by beta, the mean over pairs", _of("margin"), "margin"),
    Curve("Chosen answers", "log-probability, nats per answer", _of("chosen_log_probability")),
    Curve("Rejected answers", "log-probability, nats per answer", _of("rejected_log_probability")),
)
"""Charts for preference runs."""

IMITATING = ("sft",)
"""Commands whose loss is that of the reference completions."""
OTHERS = tuple(name for name in KINDS if name not in IMITATING)

CURVES = (
    *ROLLOUTS,
    *PREFERENCES,
    Curve("KL from the teacher", "nats per token", _of("teacher_kl"), "teacher_kl"),
    Curve("Loss", "nats per token", _of("loss"), "validation_loss", programs=IMITATING),
    Curve("Loss of the objective", "what is minimised", _of("loss"), programs=OTHERS),
    Curve("Loss of reference completions", "nats per token", validation="validation_loss", programs=OTHERS),
    Curve("KL on neutral text", "from the pretrained model, nats per token", _of("neutral_kl")),
    Curve("Accuracy on validation examples", "bars: 95 % intervals", validation="accuracy", percent=True),
    Curve("Tokens right on validation examples", "of the reference", validation="token_accuracy", percent=True),
    Curve("Gradient norm", "before clipping", lambda row: number(row.get("grad_norm")), level=_clip, log=True),
    Curve("Penalty", "added to the loss", lambda row: number(row.get("penalty")), often_zero=True),
    Curve(
        "Throughput",
        "tokens per second, without the first step",
        lambda row: number(row.get("tokens")) / (number(row.get("step_seconds")) or np.nan),
        warm=True,
    ),
    Curve(
        "Waiting for data",
        "share of each step's time",
        lambda row: number(row.get("data_wait")) / (number(row.get("step_seconds")) or np.nan),
        percent=True,
        warm=True,
    ),
)


def curves_of(records: Sequence[Record]) -> list[Drawing]:
    """The charts of one run, or of several with a colour each."""
    alone = len(records) == 1
    charts = [chart for curve in CURVES if (chart := _chart(curve, records))]
    if rates := _learning_rates(records):
        charts.insert(min(3, len(charts)), rates)
    if alone:
        charts += _overlap(records[0])
    return [draw(chart) for chart in charts]


def _chart(curve: Curve, records: Sequence[Record]) -> Chart | None:
    """The chart of a curve; None if no run has values for it, or all of them are 0."""
    alone = len(records) == 1
    series = [each for color, record in enumerate(records) for each in _series(curve, record, color, alone)]
    series = [each for each in series if is_drawable(each)]
    if not series or (curve.often_zero and not any(np.nan_to_num(each.y).any() for each in series)):
        return None
    return Chart(
        curve.title,
        curve.unit,
        series,
        log=curve.log and _spans_much(series),
        percent=curve.percent,
        level=curve.level(records[0]) if alone else None,
    )


def _series(curve: Curve, record: Record, color: int, alone: bool) -> Iterator[Series]:
    """The series of a run: alone, each step and smoothed; beside others, one line under the run's name."""
    if curve.programs and program_of(record.config) not in curve.programs:
        return
    rows = [row for row in record.steps if not (curve.warm and _compiled(row, record))]
    if curve.of is not None and curve.sparse:
        rows = [row for row in rows if np.isfinite(curve.of(row))]
    if curve.of is not None and rows:
        x = np.array([row["step"] for row in rows], float)
        y = np.array([curve.of(row) for row in rows], float)
        y[~np.isfinite(y)] = np.nan
        if len(y) < FEW:
            yield Series("each step" if alone else record.name, x, y, color=color)
        else:
            if alone:
                yield Series("each step", x, y, "raw", color)
            yield Series("smoothed" if alone else record.name, x, smooth(y, max(3, len(y) // 40)), color=color)
    evaluated = [row for row in record.rows if curve.validation in row]
    if evaluated:
        column = lambda name: np.array([number(row.get(name)) for row in evaluated])
        bars = (column("low"), column("high")) if curve.validation == "accuracy" else None
        own = color + 1 if alone and curve.of is not None else color
        beside = record.name if curve.of is None else f"{record.name}, validation"
        yield Series("validation" if alone else beside, column("step"), column(curve.validation), "points", own, bars)


def _compiled(row: dict[str, Any], record: Record) -> bool:
    """Whether a step was the first after a start, which compiles the program."""
    begun = {start.get("done", 0) for start in record.starts} | {0}
    return row["step"] - 1 in begun


def _spans_much(series: Sequence[Series]) -> bool:
    """Whether the values cover more than one order of magnitude."""
    values = np.concatenate([each.y[np.isfinite(each.y) & (each.y > 0)] for each in series])
    return len(values) > 0 and float(values.max() / values.min()) > 10


def _learning_rates(records: Sequence[Record]) -> Chart | None:
    series, alone = [], len(records) == 1
    for color, record in enumerate(records):
        names = sorted({name for row in record.steps for name in row if name.startswith("lr_")})
        for n, name in enumerate(names):
            points = [(row["step"], number(row[name])) for row in record.steps if name in row]
            x, y = np.array(points, float).T
            group = name.removeprefix("lr_")
            label = group if alone else record.name + (f", {group}" if len(names) > 1 else "")
            series.append(Series(label, x, y, color=n if alone else color + COLORS * n))
    series = [each for each in series if is_drawable(each)]
    return Chart("Learning rate", "", series) if series else None


def _overlap(record: Record) -> Iterator[Chart]:
    """Two charts of the overlap of LoRA and steering: by layer, and its mean."""
    rows = [row for row in record.steps if isinstance(row.get("overlap"), list) and row["overlap"]]
    rows = [row for row in rows if len(row["overlap"]) == len(rows[-1]["overlap"])]
    if not rows:
        return
    steps = np.array([row["step"] for row in rows], float)
    values = np.array([[number(each) for each in row["overlap"]] for row in rows])
    layers, chance = record.attempt("the overlap of LoRA and steering", lambda: _layers(record)) or ((), 0.0)
    labels = [str(layer) for layer in layers] if len(layers) == values.shape[1] else [""] * values.shape[1]
    with np.errstate(invalid="ignore"):
        mean, largest = values.mean(axis=1), values.max(axis=1)
    shown = (Series("mean over layers", steps, mean), Series("largest", steps, largest, color=1))
    if not is_drawable(shown[0]):
        return
    yield Chart(
        "Overlap Ω by layer", "of LoRA and steering; the lowest layer at the bottom", shown, heat=_heat(values, labels)
    )
    level = Level(chance, f"chance, {chance:.2g}") if chance else None
    yield Chart("Overlap Ω", "0: orthogonal", shown, level=level, log=_spans_much(shown))


def _layers(record: Record) -> tuple[tuple[int, ...], float]:
    """The layers that have both, and the overlap of random directions; neither is known before a run has finished."""
    if record.steering is None:
        return (), 0.0
    settings = dict(record.config["orthogonality"])
    both = Orthogonality(**{**settings, "sites": tuple(settings["sites"])})
    plan, steering = record.steering.plan, record.steering.steering
    return joint_layers(plan, steering, both), chance_overlap(plan, steering, both)


def _heat(values: np.ndarray, labels: Sequence[str]) -> Heat:
    """A picture of values [steps, layers]; with many steps, of the means of neighbours."""
    parts = np.array_split(values, min(len(values), MOST_COLUMNS))
    pixels = np.array([np.nanmean(part, axis=0) for part in parts]).T
    top = float(np.nanmax(pixels)) or 1.0
    return Heat(picture_of(pixels, top), labels, (0.0, top), picture_of(np.linspace(0, top, 64)[None], top))


def picture_of(values: np.ndarray, top: float) -> str:
    """Values [rows, columns] from 0 to `top` as a PNG in a data URI, the first row at the bottom."""
    file = io.BytesIO()
    matplotlib.image.imsave(file, values, vmin=0.0, vmax=top, cmap="cividis", origin="lower", format="png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
