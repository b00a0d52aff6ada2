"""What is shown and written of a sweep: tables, the plot of effect against cost, projections of tokens, figures."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from jaxsteer.batches import bucket_length, stack_rows
from jaxsteer.contrast import Directions, token_projections
from jaxsteer.io import Tokenizer
from jaxsteer.models.transformer import Network
from train.contrast.sweep import Cell
from train.data import TokenizedExample
from train.display.console import get_console
from train.display.heatmap import render_heatmap
from train.display.plots import Panel, plot_lines
from train.evaluation.replies import pieces_of
from train.evaluation.statistics import Estimate

LIMIT = 3.0
"""Projections are shown up to this: the first token of a text is often far beyond all others."""


@dataclass(frozen=True)
class Outcome:
    """What a sweep has found.

    before   the untouched model
    cells    all that were measured
    leading  the best affordable cell of each layer, with its answers
    chosen   the best of them
    apart    the share of the validation pairs that each layer tells apart, [L]
    effect   what the effect is, for titles
    max_kl   the most that a cell may cost
    """

    before: Cell
    cells: Sequence[Cell]
    leading: Sequence[Cell]
    chosen: Cell
    apart: np.ndarray
    effect: str
    max_kl: float

    def shows(self, cell: Cell) -> bool:
        """Whether a cell has the effect that titles name: a scorer is not asked beyond `max_kl`."""
        scored = self.before.answered is not None and self.before.answered.score is not None
        return cell.finite and (not scored or (cell.answered is not None and cell.answered.score is not None))

    def to_json(self) -> dict[str, Any]:
        """All figures as JSON values; figures that are not finite are null."""
        return {
            "effect": self.effect,
            "max_kl": self.max_kl,
            "chosen": _plain(self.chosen),
            "untouched": _plain(self.before),
            "cells": [_plain(cell) for cell in self.cells],
            "told_apart": [round(float(share), 4) for share in self.apart],
        }


def _plain(cell: Cell) -> dict[str, Any]:
    figures: dict[str, Any] = {"layer": cell.layer, "strength": cell.strength}
    figures |= {"kl": _estimate(cell.kl), "log_probability_difference": _estimate(cell.shift)}
    if (answered := cell.answered) is not None:
        figures |= {} if answered.score is None else {"score": _estimate(answered.score)}
        fluency = answered.fluency if math.isfinite(answered.fluency) else None
        figures |= {"fluency": fluency, "repetition": answered.repetition, "answers": list(answered.texts)}
    return figures


def _estimate(estimate: Estimate) -> dict[str, float] | None:
    return estimate._asdict() if math.isfinite(estimate.mean) else None


def print_outcome(outcome: Outcome) -> None:
    """Print the best strength of each layer, the dial of the chosen one, and a few answers."""
    title = (
        f"Best strength of each layer with KL up to {outcome.max_kl:g}\neffect: {outcome.effect} (± 95 %)\n"
        "KL, fluency: nats per token"
    )
    table = _table(title, ("layer", "told apart", "strength", "effect", "KL", "fluency", "repetition"))
    table.add_row("untouched", "", "", *_figures(outcome.before))
    for cell in outcome.leading:
        mark = " *" if cell.layer == outcome.chosen.layer else ""
        apart = f"{100 * outcome.apart[cell.layer]:.0f} %"
        table.add_row(f"{cell.layer}{mark}", apart, f"{cell.strength:g}", *_figures(cell))
    dial = _table(f"The dial at layer {outcome.chosen.layer}", ("strength", "effect", "KL"))
    for cell in outcome.cells:
        if cell.layer == outcome.chosen.layer:
            mark = " *" if cell.strength == outcome.chosen.strength else ""
            effect, kl = _figures(cell)[:2]
            dial.add_row(f"{cell.strength:g}{mark}", effect if outcome.shows(cell) or not cell.finite else "-", kl)
    get_console().print(table, dial)


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _figures(cell: Cell) -> tuple[str, str, str, str]:
    answered = cell.answered
    fluency, repetition = ("", "") if answered is None else (f"{answered.fluency:.2f}", f"{answered.repetition:.2f}")
    return _interval(cell.effect), f"{cell.kl.mean:.3f}" if cell.finite else "not finite", fluency, repetition


def _interval(estimate: Estimate) -> str:
    if not math.isfinite(estimate.mean):
        return "not finite"
    return f"{estimate.mean:+.3f} ± {estimate.high - estimate.mean:.3f}"


def print_answers(prompts: Sequence[str], outcome: Outcome, shown: int = 3) -> None:
    """Print the first few answers of the untouched and of the steered model."""
    before, after = outcome.before.answered, outcome.chosen.answered
    assert before is not None
    assert after is not None
    table = Table(title="Answers", title_justify="left", show_lines=True)
    for column in ("prompt", "untouched", "steered"):
        table.add_column(column)
    for row in list(zip(prompts, before.texts, after.texts, strict=True))[:shown]:
        table.add_row(*map(escape, row))
    get_console().print(table)


def plot_outcome(path: Path, outcome: Outcome, title: str) -> None:
    """Plot the effect against the cost, a line for each layer, with the most that a cell may cost."""
    cells = [cell for cell in outcome.cells if outcome.shows(cell)]
    effects = [cell.effect.mean for cell in cells]
    series: dict[str, tuple[Any, Any]] = {
        f"layer {layer}": tuple(
            np.array([(cell.kl.mean, cell.effect.mean) for cell in cells if cell.layer == layer]).T.tolist()
        )
        for layer in dict.fromkeys(cell.layer for cell in cells)
    }
    series["_budget"] = ([outcome.max_kl] * 2, [min(effects), max(effects)])
    panel = Panel(series, "KL on neutral text, nats per token", textwrap.fill(outcome.effect, 32), log="x")
    plot_lines(path, [panel], title=title)


@dataclass(frozen=True)
class Projecting:
    """What projections are shown with: the untouched model, its tokenizer, the directions, and the chosen layer."""

    network: Network
    tokenizer: Tokenizer
    directions: Directions
    layer: int

    def show(self, text: TokenizedExample, name: str, png: Path) -> None:
        """Print a text coloured by its tokens' projections at the layer, and draw those of all layers."""
        batch = stack_rows([[text]], bucket_length(len(text)))
        found = token_projections(self.network.model, self.network.base, batch, self.directions)
        scores = np.asarray(found, np.float64)[:, 0, : len(text)]
        if not np.isfinite(scores).all():
            raise FloatingPointError(f"{name}: the model's activations are not finite on this text")
        pieces = pieces_of(text.ids, self.tokenizer.decode)
        out, shown = get_console(), np.clip(scores, -LIMIT, LIMIT)
        out.print(f"{name}: projections at layer {self.layer} (orange: positive side, blue: negative)", markup=False)
        out.print(render_heatmap(pieces, shown[self.layer]))
        render_heatmap(pieces, shown, label=f"projection, ±1 the sides (up to ±{LIMIT:g})", png=png)
