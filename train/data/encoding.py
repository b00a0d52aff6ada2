"""How examples become tokens, and statistics of what became of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date as calendar_date
from typing import Literal, get_args

from jaxsteer.io import Tokenizer
from train.data.chat import depends_on_date

OnLong = Literal["error", "drop", "cut"]
"""What to do with examples over the maximum length: raise an error, drop them, or cut the beginning of the prompt."""

LossOn = Literal["completion", "all"]
"""Which tokens are targets: those of the completions and of texts, or every token, the prompts' too."""


@dataclass(frozen=True)
class Encoding:
    """How examples become tokens: the same for training, evaluation, scoring and generation.

    chat        use the tokenizer's chat template
    date        ISO date that a chat template prints, if it prints one; None for today
    loss_on     which tokens are targets of the loss; what is steered does not depend on it
    max_length  maximum number of tokens in an example, usually the sequence length; None for no limit
    on_long     what to do with longer examples: "error" raises; "drop" leaves them out; "cut" removes as many tokens as
                necessary from the beginning of a plain prompt or text, never from a completion
    """

    chat: bool = False
    date: str | None = None
    loss_on: LossOn = "completion"
    max_length: int | None = None
    on_long: OnLong = "error"

    def __post_init__(self) -> None:
        """Reject settings that do not exist, or that chats do not have."""
        for option, value, allowed in (
            ("--on-long", self.on_long, get_args(OnLong)),
            ("--loss-on", self.loss_on, get_args(LossOn)),
        ):
            if value not in allowed:
                raise ValueError(f"{option}: got {value!r}, allowed are {', '.join(allowed)}")
        if self.on_long == "cut" and self.chat:
            raise ValueError(
                "--on-long cut is for plain prompts; a conversation cannot be cut at the beginning: use --on-long drop"
            )
        if self.date is not None:
            try:
                calendar_date.fromisoformat(self.date)
            except ValueError as error:
                raise ValueError(f"--date: got {self.date!r}, need a date such as 2026-11-26 ({error})") from None

    def dated(self, tokenizer: Tokenizer) -> Encoding:
        """The same with the date that the tokenizer's chat template prints: today's if none is set, None if none is
        printed."""
        if not (self.chat and depends_on_date(tokenizer)):
            return replace(self, date=None)
        return replace(self, date=calendar_date.today().isoformat() if self.date is None else self.date)


PLAIN = Encoding()
"""Prompts and completions as they are, of any length."""


@dataclass(frozen=True)
class Report:
    """Statistics of encoding a data set.

    examples    number of examples given
    tokens      number of tokens in the examples kept
    supervised  number of those tokens whose weight in the loss is not 0
    longest     length of the longest example given, in tokens
    max_length  the maximum length; None for no limit
    too_long    (source, length) of every example dropped for its length
    cut         (source, original length) of every example whose prompt was cut
    begun       number of examples whose text began with the tokenizer's beginning of a text, which was not repeated
    ended       number of examples with a completion that ended with the end token, which was not repeated
    straddled   number of examples that were split where a token of the whole text would have spanned the beginning or
                the end of a completion
    """

    examples: int
    tokens: int
    supervised: int
    longest: int
    max_length: int | None
    too_long: tuple[tuple[str, int], ...] = ()
    cut: tuple[tuple[str, int], ...] = ()
    begun: int = 0
    ended: int = 0
    straddled: int = 0

    @property
    def kept(self) -> int:
        """Number of examples kept."""
        return self.examples - len(self.too_long)

    def __str__(self) -> str:
        """A one-line summary that names the first few examples dropped or cut."""
        text = f"{self.kept:,} examples, {self.tokens:,} tokens"
        text += f" ({self.supervised:,} supervised)" if self.supervised else ""
        text += f"; dropped {too_long_text(self, self.too_long)}" if self.too_long else ""
        text += f"; cut the prompts of {too_long_text(self, self.cut)}" if self.cut else ""
        if self.begun:
            text += f"; {self.begun:,} began with the beginning-of-sequence token, which was not added again"
        if self.ended:
            text += f"; {self.ended:,} had a completion that ended with the end token, which was not added again"
        if self.straddled:
            text += (
                f"; in {self.straddled:,} a token would have spanned prompt and completion, and was split (a space "
                "belongs at the beginning of a completion, not at the end of its prompt)"
            )
        return text


def too_long_text(report: Report, examples: Sequence[tuple[str, int]]) -> str:
    """How many examples are over the maximum length; names the first few."""
    named = ", ".join(f"{source} ({length})" for source, length in examples[:3])
    more = ", ..." if len(examples) > 3 else ""
    return (
        f"{len(examples):,} of {report.examples:,} examples longer than {report.max_length} tokens "
        f"(longest {report.longest}): {named}{more}"
    )
