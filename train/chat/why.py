"""What steering did to a message and its answer, on the screen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from train.chat.screen import visible
from train.display.heatmap import render_heatmap
from train.serving.effects import Effects, TokenEffect
from train.serving.text import Alternative

MOST = 5
"""Tokens in the table of those that are moved most."""

_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Explanation:
    """What steering did to the tokens of an exchange, numbered from 1.

    effects  of all that the model read and wrote
    start    where the message begins in it
    title    who is compared with the base model
    """

    effects: Effects
    start: int
    title: str

    @classmethod
    def of(cls, effects: Effects, message: str, title: str) -> Explanation:
        """The effects from a message on; what the model read before it is left out."""
        texts = [token.text for token in effects.tokens if token.part == "prompt"]
        ends = np.cumsum([len(text) for text in texts])
        at = max("".join(texts).rfind(message), 0)
        return cls(effects, int(np.searchsorted(ends, at, side="right")), title)

    @property
    def tokens(self) -> tuple[TokenEffect, ...]:
        """The tokens of the exchange."""
        return self.effects.tokens[self.start :]

    @property
    def shift(self) -> np.ndarray:
        """‖Δh‖ / ‖h‖ of these tokens after each block, [L, T]."""
        return self.effects.shift[:, self.start :]

    def show(self, console: Console, *, every: bool = False, picture: Path | None = None) -> None:
        """The text coloured by shift, the shift by layer, and a table of the tokens moved most, or of all.

        Args:
            console: where to.
            every: list all tokens.
            picture: file for tokens × layers, *.png.
        """
        moved = self.shift.mean(axis=0)
        console.print(
            f"‖Δh‖ / ‖h‖ of each token, mean over layers, {self.title} against base (largest {moved.max():.4f})",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        console.print(self.coloured(0, picture), soft_wrap=True)
        console.print(by_layer(self.shift.mean(axis=1)), highlight=False, soft_wrap=True)
        shown = range(len(moved)) if every else sorted(np.argsort(-moved, kind="stable")[:MOST].tolist())
        title = "all tokens" if every else f"the {len(shown)} tokens moved most"
        console.print(self._table(shown, f"{title} (/why N: more about one)"))

    def show_answer(self, console: Console) -> None:
        """The answer alone, coloured by shift."""
        first = sum(token.part == "prompt" for token in self.tokens)
        if first < len(self.tokens):
            console.print(self.coloured(first), soft_wrap=True)

    def coloured(self, first: int, picture: Path | None = None) -> Text:
        """The text from a token on, on the colours of its shifts."""
        pieces = [visible(token.text) for token in self.tokens[first:]]
        return render_heatmap(pieces, self.shift[:, first:], label="‖Δh‖ / ‖h‖", png=picture)

    def show_token(self, console: Console, number: int) -> None:
        """One token: its shift by layer, and the likeliest tokens in its place without and with steering.

        Raises:
            ValueError: there is no token of this number.
        """
        if not 1 <= number <= len(self.tokens):
            raise ValueError(
                f"/why {number}: the last exchange has tokens 1 to {len(self.tokens)}; /why all lists them"
            )
        token = self.tokens[number - 1]
        moved = f"‖Δh‖ / ‖h‖ {token.shift.mean():.4f}, mean over layers"
        console.print(Text(f"token {number}, {visible(token.text)!r} of the {token.part}: {moved}"), soft_wrap=True)
        console.print(by_layer(token.shift), highlight=False, soft_wrap=True)
        if token.log_probability is None:
            console.print("nothing comes before this token, so nothing predicts it", highlight=False)
            return
        base, steered = _percent(token.log_probability_base), _percent(token.log_probability)
        console.print(f"probability given the text before it: {base} base, {steered} steered", highlight=False)
        if token.top:
            table = Table(title="likeliest tokens in its place", title_justify="left")
            for column in ("base", "p", "steered", "p"):
                table.add_column(column, justify="right" if column == "p" else "left")
            for one, other in zip(token.top_base, token.top, strict=True):
                table.add_row(*_cells(one), *_cells(other))
            console.print(table)

    def _table(self, numbers: Sequence[int], title: str) -> Table:
        table = Table(title=title, title_justify="left")
        for column in ("N", "token", "part", "‖Δh‖ / ‖h‖", "p base", "p steered"):
            table.add_column(column, justify="left" if column in ("token", "part") else "right")
        for number in numbers:
            token = self.tokens[number]
            probabilities = _percent(token.log_probability_base), _percent(token.log_probability)
            shift = f"{token.shift.mean():.4f}"
            table.add_row(str(number + 1), Text(repr(token.text)), token.part, shift, *probabilities)
        return table


def by_layer(shift: np.ndarray) -> str:
    """The shift after each block, [L], as a line of bars."""
    scale = float(shift.max()) or 1.0
    bars = "".join(_BARS[min(int(value / scale * len(_BARS)), len(_BARS) - 1)] for value in shift)
    return f"layers 0 to {len(shift) - 1}: {bars} largest {shift.max():.4f} after layer {int(shift.argmax())}"


def _percent(log_probability: float | None) -> str:
    return "" if log_probability is None else f"{100 * math.exp(log_probability):.1f} %"


def _cells(likely: Alternative) -> tuple[Text, str]:
    return Text(repr(likely.text)), _percent(likely.log_probability)
