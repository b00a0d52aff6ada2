"""Plots as PNG files, drawn without a display."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator, NullLocator, PercentFormatter, StrMethodFormatter
from numpy.typing import ArrayLike

# Okabe and Ito's palette, which colour-blind readers can distinguish; markers distinguish the lines in grey too.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_INK, _GREY = "#222222", "#666666"


def plot_training(
    rows: Sequence[Mapping[str, object]],
    path: str | Path,
    *,
    evaluations: Sequence[tuple[int, float, float, float]] = (),
    title: str = "",
) -> None:
    """Plot the loss by step, as logged and smoothed, and below it the accuracy with its intervals.

    Args:
        rows: lines of metrics.jsonl; those with a "loss" are drawn, with gaps where it is not finite, and those with a
            "validation_loss" as points.
        path: of the PNG; its folder must exist.
        evaluations: (step, accuracy, low, high), shares from 0 to 1; if empty, there is no accuracy panel.
        title: above the figure.

    Raises:
        ValueError: nothing to draw.
    """
    points = [(row["step"], float(cast(float, row["loss"]))) for row in rows if row.get("loss") is not None]
    if not points and not evaluations:
        raise ValueError(f"{path}: nothing to draw, no row has a loss and there are no evaluations")
    panels = bool(points) + bool(evaluations)
    figure, axes = _figure(panels, title, height=3.6 if panels == 1 else 5.8, ratios=(3, 2)[:panels])
    if points:
        _draw_loss(axes[0], np.array(points))
        _draw_validation_loss(axes[0], rows)
    if evaluations:
        _draw_accuracy(axes[-1], np.array(sorted(evaluations), dtype=float))
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    _save(figure, path)


def plot_by_layer(
    path: str | Path,
    series: Mapping[str, Sequence[float]],
    *,
    ylabel: str,
    xlabel: str = "layer",
    title: str = "",
    bands: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
) -> None:
    """Plot one line by layer for each label.

    Args:
        path: of the PNG; its folder must exist.
        series: label -> a value for each layer, from layer 0; NaN leaves a gap.
        ylabel: of the axis of values.
        xlabel: of the axis of layers.
        title: above the figure.
        bands: label -> (low, high), a shaded band around its line.

    Raises:
        ValueError: nothing to draw.
    """
    if not any(len(values) for values in series.values()):
        raise ValueError(f"{path}: nothing to draw, every series is empty")
    figure, (axis,) = _figure(1, title, height=3.8, ratios=(1,))
    for index, (label, values) in enumerate(series.items()):
        if bands and label in bands:
            color = _COLORS[index % len(_COLORS)]
            axis.fill_between(np.arange(len(values)), *bands[label], color=color, alpha=0.2, linewidth=0)
        axis.plot(
            np.arange(len(values)),
            np.asarray(values, dtype=float),
            color=_COLORS[index % len(_COLORS)],
            marker=_MARKERS[index % len(_MARKERS)],
            linestyle=("-", "--", ":")[index // len(_COLORS) % 3],
            markersize=4.5,
            linewidth=1.6,
            label=label,
        )
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(series) > 1:
        _legend(axis)
    _save(figure, path)


@dataclass(frozen=True)
class Panel:
    """One panel of `plot_lines`.

    series  label -> (x, y) of a line; NaN leaves a gap, and a label that starts with "_" is not in the legend
    xlabel, ylabel, title  of the panel
    log     logarithmic axes: "", "x", "y" or "xy"
    level   y of a dashed horizontal line
    """

    series: Mapping[str, tuple[ArrayLike, ArrayLike]]
    xlabel: str
    ylabel: str
    title: str = ""
    log: str = ""
    level: float | None = None


def plot_lines(path: str | Path, panels: Sequence[Panel], *, title: str = "") -> None:
    """Plot panels of lines, one below the other.

    Args:
        path: of the PNG; its folder must exist.
        panels: from top to bottom.
        title: above the figure.

    Raises:
        ValueError: nothing to draw.
    """
    if not any(np.size(x) for panel in panels for x, _ in panel.series.values()):
        raise ValueError(f"{path}: nothing to draw, every series is empty")
    shared = len({panel.xlabel for panel in panels}) == 1
    figure, axes = _figure(len(panels), title, height=0.6 + 3.2 * len(panels), ratios=(1,) * len(panels), shared=shared)
    for axis, panel in zip(axes, panels, strict=True):
        _draw_panel(axis, panel)
        if panel is panels[-1] or not shared:
            axis.set_xlabel(panel.xlabel)
    _save(figure, path)


def _draw_panel(axis: Axes, panel: Panel) -> None:
    labels = [label for label in panel.series if not label.startswith("_")]
    for label, (x, y) in panel.series.items():
        guide, index = label.startswith("_"), labels.index(label) if label in labels else 0
        axis.plot(
            np.asarray(x, float),
            np.asarray(y, float),
            color=_GREY if guide else _COLORS[index % len(_COLORS)],
            marker="" if guide else _MARKERS[index % len(_MARKERS)],
            linestyle=":" if guide else ("-", "--")[index // len(_COLORS) % 2],
            markersize=4,
            linewidth=1.0 if guide else 1.6,
            label=label,
        )
    if "x" in panel.log:
        axis.set_xscale("log")
    if "y" in panel.log:
        axis.set_yscale("log")
    if panel.level is not None:
        axis.axhline(panel.level, color=_GREY, linestyle="--", linewidth=1.0)
    axis.set_ylabel(panel.ylabel)
    if panel.title:
        axis.set_title(panel.title, fontsize=11, color=_INK, loc="left")
    if len(labels) > 1:
        _legend(axis)


def plot_overlap(
    path: str | Path, steps: Sequence[int], overlap: np.ndarray, *, chance: float, title: str = ""
) -> None:
    """Plot the overlap Ω of LoRA and steering as a heat map, layer by step, and below it the mean over layers.

    Args:
        path: of the PNG; its folder must exist.
        steps: of the measurements.
        overlap: [steps, layers], in [0, 1].
        chance: overlap of random directions, R/D; drawn as a line.
        title: above the figure.

    Raises:
        ValueError: nothing to draw.
    """
    values = np.asarray(overlap, float)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"{path}: nothing to draw, the overlap is {values.shape}, need [steps, layers]")
    figure, (top, bottom) = _figure(2, title, height=5.4, ratios=(3, 2))
    mesh = top.pcolormesh(np.asarray(steps), np.arange(values.shape[1]), values.T, cmap="cividis", shading="nearest")
    figure.colorbar(mesh, ax=top, label="overlap Ω", pad=0.01)
    top.set_ylabel("layer")
    top.grid(False)
    bottom.plot(steps, values.mean(axis=1), color=_COLORS[0], linewidth=2.0, label="mean over layers")
    bottom.plot(steps, values.max(axis=1), color=_COLORS[0], linewidth=1.0, linestyle=":", label="largest")
    bottom.axhline(chance, color=_COLORS[1], linestyle="--", linewidth=1.2, label=f"chance, {chance:.2g}")
    bottom.set_yscale("symlog", linthresh=1e-4)
    bottom.set_ylim(bottom=0)
    bottom.set_ylabel("overlap Ω")
    bottom.set_xlabel("step")
    _legend(bottom)
    _save(figure, path)


Point = tuple[float, float, float, float]
"""x, and a share from 0 to 1 with its interval: value, low, high."""


def plot_comparison(
    path: str | Path,
    series: Mapping[str, Sequence[Point]],
    *,
    xlabel: str,
    base: float | None,
    bands: bool = True,
    title: str = "",
) -> None:
    """Plot accuracy against something, on a logarithmic axis: the points of a series are joined by a line.

    Args:
        path: of the PNG; its folder must exist.
        series: label -> its points, in the order of the line.
        xlabel: what x is.
        bands: draw the intervals of several points as a band, for x that is exact; else each as a bar.
        base: accuracy of the untouched model, drawn as a line unless it is far from all points; None = no line.
        title: above the figure.

    Raises:
        ValueError: no points.
    """
    if not series:
        raise ValueError(f"{path}: nothing to draw, no method has finished")
    figure, (axis,) = _figure(1, title, height=5.0, ratios=(1,))
    for index, (name, points) in enumerate(series.items()):
        x, rate, low, high = np.array(points, dtype=float).T
        color = _COLORS[index % len(_COLORS)]
        marker = _MARKERS[(index + index // len(_COLORS)) % len(_MARKERS)]
        if bands and len(x) > 1:
            axis.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
            axis.plot(x, rate, color=color, marker=marker, markersize=6, linewidth=1.8, label=name)
        else:
            bar = np.maximum(0.0, [rate - low, high - rate])
            axis.errorbar(x, rate, yerr=bar, color=color, marker=marker, markersize=7, capsize=3, label=name)
    if base is not None:
        _draw_base(axis, base)
    _logarithmic(axis, {point[0] for points in series.values() for point in points} if bands else ())
    axis.set_xlabel(xlabel)
    axis.set_ylabel("accuracy (bars and bands: 95 % intervals)")
    axis.yaxis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=0))
    axis.legend(frameon=False, fontsize=9, labelcolor=_INK, loc="center left", bbox_to_anchor=(1.01, 0.5))
    _save(figure, path)


def _draw_base(axis: Axes, base: float) -> None:
    """Draw a line at `base`, or only name it if the points would then fill less than half of the height."""
    low, high = axis.get_ylim()
    far = max(low - base, base - high) > high - low
    label = f"untouched model: {100 * base:.1f} %" if far else "untouched model"
    axis.axhline(base, color=_GREY, linestyle="--", linewidth=1.2, label=label)
    if far:
        axis.set_ylim(low, high)


class _PlainNumbers(LogFormatter):
    """Labels those ticks that there is room for, as `LogFormatter` does, without exponents."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:,.10g}" if super().__call__(x, pos) else ""


def _logarithmic(axis: Axes, exact: Iterable[float]) -> None:
    """Make x logarithmic, with plain numbers: the exact values of x if they are few and far enough apart."""
    axis.set_xscale("log")
    ordered = sorted(exact)
    if 0 < len(ordered) <= 8 and all(high >= 1.5 * low for low, high in itertools.pairwise(ordered)):
        axis.set_xticks(ordered)
        axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_minor_formatter(_PlainNumbers())
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """A centred mean with Gaussian weights over about `window` values, fewer at the ends; skips NaN."""
    reach = min(3 * window, len(values))
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / max(window / 2, 1e-6)) ** 2)
    finite = np.isfinite(values)

    def weighted_sum(x: np.ndarray) -> np.ndarray:
        return np.convolve(x, weights, mode="full")[reach : reach + len(x)]

    total = weighted_sum(finite.astype(float))
    return np.where(total > 1e-9, weighted_sum(np.where(finite, values, 0.0)) / np.maximum(total, 1e-9), math.nan)


def _draw_loss(axis: Axes, points: np.ndarray) -> None:
    points = points[np.argsort(points[:, 0], kind="stable")]
    steps, losses = points[:, 0], np.where(np.isfinite(points[:, 1]), points[:, 1], math.nan)
    axis.set_ylabel("training loss\n(nats per token)")
    if len(steps) < 20:
        axis.plot(steps, losses, color=_COLORS[0], linewidth=1.8, marker="o", markersize=4)
    else:
        axis.plot(steps, losses, color=_COLORS[0], alpha=0.3, linewidth=0.8, label="each step")
        smoothed = smooth(losses, max(3, len(steps) // 40))
        axis.plot(steps, smoothed, color=_COLORS[0], linewidth=2.0, label="smoothed")
        _legend(axis)
    if np.isfinite(losses).any():
        axis.set_ylim(*usual_range(losses[np.isfinite(losses)]))


def _draw_validation_loss(axis: Axes, rows: Sequence[Mapping[str, object]]) -> None:
    points = [(row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row]
    if points:
        steps, losses = np.array(points, dtype=float).T
        axis.plot(steps, losses, color=_COLORS[1], linewidth=1.2, marker="o", markersize=4, label="validation")
        axis.set_ylabel("loss (nats per token)")
        finite = np.concatenate([axis.get_ylim(), losses[np.isfinite(losses)]])
        axis.set_ylim(finite.min(), finite.max() + 0.02 * np.ptp(finite))
        _legend(axis)


def usual_range(values: np.ndarray) -> tuple[float, float]:
    """The range of finite values, with a margin; a few spikes are left out, so that they do not flatten a curve."""
    low, usual, high = float(values.min()), float(np.quantile(values, 0.99)), float(values.max())
    if len(values) >= 100 and high - low > 3 * (usual - low) > 0:
        high = usual + 0.5 * (usual - low)
    margin = 0.05 * (high - low) or 0.1 * abs(high) or 0.1
    return low - margin, high + margin


def _draw_accuracy(axis: Axes, points: np.ndarray) -> None:
    steps, rate, low, high = points.T
    bars = np.maximum([rate - low, high - rate], 0.0)
    axis.errorbar(
        steps,
        rate,
        yerr=bars,
        color=_COLORS[1],
        marker="o",
        markersize=5,
        linewidth=1.6,
        elinewidth=1.2,
        capsize=3,
    )
    axis.set_ylabel("accuracy\n(bars: 95 % interval)")
    axis.yaxis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=None))
    axis.set_ylim(max(-0.02, float(low.min()) - 0.08), min(1.02, float(high.max()) + 0.08))
    axis.annotate(
        f"{100 * rate[-1]:.1f} %",
        (steps[-1], rate[-1]),
        xytext=(8, 0),
        textcoords="offset points",
        va="center",
        color=_COLORS[1],
        annotation_clip=False,
    )


def _figure(
    panels: int, title: str, *, height: float, ratios: Sequence[int], shared: bool = True
) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(8.0, height), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(panels, 1, sharex=shared, squeeze=False, gridspec_kw={"height_ratios": list(ratios)})
    axes = list(grid[:, 0])
    if title:
        figure.suptitle(title, fontsize=13, color=_INK)
    for axis in axes:
        axis.grid(True, color="#DDDDDD", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.margins(x=0.02)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color("#999999")
        axis.tick_params(which="both", labelsize=10, colors=_GREY)
        axis.xaxis.label.set(fontsize=11, color=_INK)
        axis.yaxis.label.set(fontsize=11, color=_INK)
    return figure, axes


def _legend(axis: Axes) -> None:
    axis.legend(frameon=False, fontsize=10, labelcolor=_INK)


def _save(figure: Figure, path: str | Path) -> None:
    figure.savefig(Path(path), dpi=150, format="png")
