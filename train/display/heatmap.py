"""Text whose tokens are coloured by a number, on a terminal and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.text import Text

_LOW, _HIGH, _NEGATIVE = (255, 255, 255), (213, 94, 0), (0, 114, 178)
_COLUMNS = 60
"""Tokens that a picture shows with their text; more would be too small to read."""


def render_heatmap(
    pieces: Sequence[str], values: np.ndarray, *, label: str = "", png: str | Path | None = None
) -> Text:
    """Colour the pieces of a text by a value each, and draw all values as a picture if asked.

    Args:
        pieces: the text of each of T tokens.
        values: [T], or [rows, T], of which the text shows the mean over rows. Where any is negative, colours go both
            ways from 0, blue below it.
        label: what the values are, for the picture's colour bar.
        png: file for a picture with a column for each token and a row for each row of values, the first at the bottom.

    Returns:
        The pieces one after the other, each on its colour; print it with `rich`.

    Raises:
        ValueError: another number of values than pieces, or values that are not finite.
    """
    values = np.asarray(values, np.float64)
    if values.ndim not in (1, 2) or values.shape[-1] != len(pieces) or not values.size:
        raise ValueError(f"a heat map of {len(pieces)} pieces needs as many values, got shape {list(values.shape)}")
    if not np.isfinite(values).all():
        raise ValueError("a heat map needs finite values, but some are NaN or infinite")
    rows = values if values.ndim == 2 else values[None]
    if png is not None:
        _draw(Path(png), pieces, rows, label)
    shown = rows.mean(axis=0)
    scale = float(np.abs(shown).max()) or 1.0
    text = Text()
    for piece, value in zip(pieces, shown, strict=True):
        color = ",".join(map(str, _color(value / scale)))
        text.append(piece, style=f"#222222 on rgb({color})")
    return text


def _color(share: float) -> tuple[int, ...]:
    """White at 0, orange at 1, blue at -1."""
    end = _HIGH if share >= 0 else _NEGATIVE
    return tuple(round(low + abs(share) * (high - low)) for low, high in zip(_LOW, end, strict=True))


def _draw(path: Path, pieces: Sequence[str], rows: np.ndarray, label: str) -> None:
    count, tokens = rows.shape
    width = min(16.0, max(4.0, 2.0 + 0.28 * tokens))
    figure = Figure(figsize=(width, min(12.0, max(2.5, 1.8 + 0.2 * count))), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    signed = bool((rows < 0).any())
    limit = float(np.abs(rows).max()) or 1.0
    image = axis.imshow(
        rows,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        cmap="RdBu_r" if signed else "Oranges",
        vmin=-limit if signed else 0.0,
        vmax=limit,
    )
    if tokens <= _COLUMNS:
        # "$" would begin a formula.
        names = [repr(piece)[1:-1].replace("$", r"\$") for piece in pieces]
        axis.set_xticks(range(tokens), names, rotation=90, fontsize=8)
    else:
        axis.set_xlabel("token")
    if count == 1:
        axis.set_yticks([])
    else:
        axis.set_ylabel("layer")
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=axis, label=label)
    figure.savefig(path, dpi=150, format="png")
