"""Charts as coordinates, which templates/chart.html.j2 turns into SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator

from train.display.plots import usual_range

_Scale = Callable[..., Any]
"""Maps values to coordinates."""

LEFT, WIDTH, HEIGHT = 64, 484, 210
"""Room for the labels of the vertical axis, and the size of the area inside the axes."""

COLORS = 7
"""Number of colours in style.css; more lines are dashed."""

MOST_POINTS, MOST_STRIPS = 500, 120
"""Maximum number of points of a line, and of places that show their values when pointed at."""


@dataclass(frozen=True)
class Series:
    """Values by step.

    label  for the legend
    x, y   [n]; NaN leaves a gap
    style  a line, one in the background, or points joined by a line
    color  number of its colour
    bars   ends of an interval around each point, [n] each
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    style: Literal["line", "raw", "points"] = "line"
    color: int = 0
    bars: tuple[np.ndarray, np.ndarray] | None = None


class Level(NamedTuple):
    """A dashed horizontal line."""

    value: float
    label: str


class Heat(NamedTuple):
    """A picture in place of a vertical axis with numbers.

    picture  a PNG as a data URI, one pixel per value, the first row at the bottom
    labels   of its rows, from the bottom
    range    the values of its darkest and brightest colour
    scale    a PNG of one row with the colours between them
    """

    picture: str
    labels: Sequence[str]
    range: tuple[float, float]
    scale: str


@dataclass(frozen=True)
class Chart:
    """What is to be drawn; the horizontal axis counts steps.

    title, unit  of the values
    series       at least one with a finite value
    log          logarithmic vertical axis
    percent      the values are shares
    level        a line to compare with
    heat         a picture behind everything; the series are then only shown where they are pointed at
    """

    title: str
    unit: str
    series: Sequence[Series]
    log: bool = False
    percent: bool = False
    level: Level | None = None
    heat: Heat | None = None


class Tick(NamedTuple):
    """A place on an axis, and its label."""

    at: float
    label: str


class Stroke(NamedTuple):
    """One series as an SVG path, with points (x, y) and bars (x, top, bottom)."""

    path: str
    label: str
    style: str
    color: int
    dashed: bool
    points: list[tuple[float, float]]
    bars: list[tuple[float, float, float]]


class Strip(NamedTuple):
    """A vertical strip that shows the values at its middle."""

    left: float
    width: float
    middle: float
    text: str


class Drawing(NamedTuple):
    """A chart in coordinates of the area inside its axes, from the top left."""

    chart: Chart
    strokes: list[Stroke]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    level: float | None
    strips: list[Strip]


def is_drawable(series: Series) -> bool:
    """Whether it has a finite value."""
    return bool(np.isfinite(series.y).any())


def draw(chart: Chart) -> Drawing:
    """Lay out a chart; series without a finite value are left out."""
    series = [each for each in chart.series if is_drawable(each)]
    x_low, x_high = _x_range(series)
    y_low, y_high = _y_range(chart, series)
    scaled = np.log10 if chart.log else np.asarray
    to_x: _Scale = lambda x: (np.asarray(x, float) - x_low) / (x_high - x_low) * WIDTH
    with np.errstate(divide="ignore", invalid="ignore"):
        to_y = lambda y: (scaled(y_high) - scaled(np.asarray(y, float))) / (scaled(y_high) - scaled(y_low)) * HEIGHT
        strokes = [] if chart.heat else [_stroke(each, to_x, to_y) for each in series]
        y_ticks = _row_labels(chart.heat) if chart.heat else _y_ticks(chart, y_low, y_high, to_y)
        level = None if chart.level is None else float(to_y(chart.level.value))
    whole = [at for at in _inside(MaxNLocator(5, integer=True), x_low, x_high) if at == round(at)]
    x_ticks = [Tick(_rounded(to_x(at)), f"{at:,.0f}") for at in whole]
    return Drawing(chart, strokes, x_ticks, y_ticks, level, _strips(chart, series, to_x))


def _x_range(series: Sequence[Series]) -> tuple[float, float]:
    low = min(float(each.x.min()) for each in series)
    high = max(float(each.x.max()) for each in series)
    margin = 0.02 * (high - low) or 0.5
    return low - margin, high + margin


def _y_range(chart: Chart, series: Sequence[Series]) -> tuple[float, float]:
    values = [np.concatenate([each.y, *(each.bars or ())]) for each in series]
    values = [each[np.isfinite(each)] for each in values]
    if chart.log:
        positive = np.concatenate(values)[np.concatenate(values) > 0]
        return (positive.min() / 1.25, positive.max() * 1.25) if len(positive) else (0.1, 1.0)
    # Points are few, and none of them is a spike.
    range_of = {"points": lambda known: (known.min() - 0.05 * np.ptp(known), known.max() + 0.05 * np.ptp(known))}
    ranges = [range_of.get(each.style, usual_range)(known) for each, known in zip(series, values, strict=True)]
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    if all(known.min() >= 0 for known in values):
        low = max(low, 0.0)
    if low == high:
        low, high = low - (0.1 * abs(low) or 0.1), high + (0.1 * abs(high) or 0.1)
    margin = 0.03 * (high - low)  # so that points at 0 and 100 % are whole
    return (max(low, 0.0) - margin, min(high, 1.0) + margin) if chart.percent else (low, high)


def _inside(locator: MaxNLocator | LogLocator, low: float, high: float) -> list[float]:
    """The locator's ticks in a range."""
    return [float(at) for at in locator.tick_values(low, high) if low <= at <= high]


def _y_ticks(chart: Chart, low: float, high: float, to_y: _Scale) -> list[Tick]:
    ticks = _inside(LogLocator(subs=(1.0,)) if chart.log else MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]), low, high)
    if len(ticks) < 2 and chart.log:
        ticks = _inside(LogLocator(subs=(1.0, 2.0, 5.0)), low, high)
    label = (lambda at: f"{100 * at:.4g} %") if chart.percent else short
    return [Tick(_rounded(to_y(at)), label(at)) for at in ticks]


def _row_labels(heat: Heat) -> list[Tick]:
    """Labels of some rows of a picture, at their middle."""
    every = math.ceil(len(heat.labels) / 8)
    height = HEIGHT / len(heat.labels)
    return [Tick(_rounded(HEIGHT - (n + 0.5) * height), heat.labels[n]) for n in range(0, len(heat.labels), every)]


def short(value: float) -> str:
    """A number in few characters: 0.0125, 1,200, 3e-05 as 3e-5."""
    if abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e7 else f"{value:.3g}".replace("e+0", "e")
    return f"{value:.4g}".replace("e-0", "e-")


def _stroke(series: Series, to_x: _Scale, to_y: _Scale) -> Stroke:
    kept = thinned(series.y, MOST_POINTS)
    xs, ys = to_x(series.x[kept]), to_y(series.y[kept])
    bars: list[tuple[float, float, float]] = []
    if series.bars is not None:
        ends = zip(to_x(series.x), to_y(series.bars[1]), to_y(series.bars[0]), strict=True)
        bars = [(_rounded(x), _rounded(top), _rounded(low)) for x, top, low in ends if np.isfinite([top, low]).all()]
    points = [(_rounded(x), _rounded(y)) for x, y in zip(xs, ys, strict=True) if np.isfinite(y)]
    return Stroke(
        path_of(xs, ys),
        series.label,
        series.style,
        series.color % COLORS,
        series.color >= COLORS,
        points if series.style == "points" else [],
        bars,
    )


def path_of(xs: np.ndarray, ys: np.ndarray) -> str:
    """An SVG path through the finite points; a point between gaps is a dot."""
    parts, pen = [], "M"
    for n, (x, y) in enumerate(zip(xs, ys, strict=True)):
        if not np.isfinite(y):
            pen = "M"
            continue
        alone = pen == "M" and (n + 1 == len(ys) or not np.isfinite(ys[n + 1]))
        parts.append(f"{pen}{_rounded(x):g} {_rounded(y):g}" + ("h0" if alone else ""))
        pen = "L"
    return "".join(parts)


def thinned(values: np.ndarray, most: int) -> np.ndarray:
    """Ascending indices that keep a curve's shape: all of few values, else the extremes of `most` / 2 equal parts."""
    if len(values) <= most:
        return np.arange(len(values))
    kept = {0, len(values) - 1}
    for part in np.array_split(np.arange(len(values)), most // 2):
        finite = part[np.isfinite(values[part])]
        if len(finite):
            kept |= {int(finite[np.argmin(values[finite])]), int(finite[np.argmax(values[finite])])}
        else:
            kept.add(int(part[0]))
    return np.array(sorted(kept))


def _strips(chart: Chart, series: Sequence[Series], to_x: _Scale) -> list[Strip]:
    places = np.unique(np.concatenate([each.x for each in series]))
    if len(places) > MOST_STRIPS:
        few = [each.x for each in series if each.style == "points" and len(each.x) <= MOST_STRIPS // 2]
        even = places[np.linspace(0, len(places) - 1, MOST_STRIPS // 2).astype(int)]
        places = np.unique(np.concatenate([even, *few]))
    middles = to_x(places)
    edges = np.concatenate([[0.0], (middles[1:] + middles[:-1]) / 2, [float(WIDTH)]])
    strips = []
    for n, place in enumerate(places):
        shown = [f"{each.label} {value}" for each in series if (value := _value_at(chart, each, place))]
        text = f"step {place:,.0f}: {' · '.join(shown)}"
        strips.append(Strip(_rounded(edges[n]), _rounded(edges[n + 1] - edges[n]), _rounded(middles[n]), text))
    return strips


def _value_at(chart: Chart, series: Series, place: float) -> str:
    found = np.flatnonzero(series.x == place)
    if not len(found):
        return ""
    show = (lambda value: f"{100 * value:.1f} %") if chart.percent else short
    value = show(float(series.y[found[0]]))
    if series.bars is None:
        return value
    low, high = (100 * end[found[0]] if chart.percent else end[found[0]] for end in series.bars)
    return f"{value} (95 %: {low:.4g} to {high:.4g})"


def _rounded(value: float) -> float:
    return round(float(value), 2)
