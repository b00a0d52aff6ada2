"""Answers to open questions: as they appear on a terminal, and as lines of a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from jaxsteer.inference.events import Answer, Finished
from train.data.prompts import Question
from train.evaluation.journal import Codec

HELD_BACK = 4
"""Characters after a space that a tokenizer's clean-up may still join to the word before it (" n't")."""

UNFINISHED = "\ufffd"
"""What the decoder writes for the first bytes of a character."""
CONTEXT = 8
"""Tokens before a token that decide what text it adds."""


@dataclass(frozen=True)
class Reply:
    """An answer to an open question, a line of an output file.

    prompt    as it was given; for a conversation, the text that the model read
    output    the answer
    tokens    number of tokens of the answer
    finished  why it ended, see `jaxsteer.inference.events.Finished`
    row       the line of the input file; None for other prompts
    """

    prompt: str
    output: str
    tokens: int
    finished: Finished
    row: Mapping[str, Any] | None = None


REPLIES = Codec(asdict, lambda row: Reply(**row))
"""Replies in a journal."""


def reply_of(question: Question, asked: str, answer: Answer, decode: Callable[[np.ndarray], str]) -> Reply:
    """The reply to a question of which the model read the text `asked`."""
    prompt = asked if question.text is None else question.text
    return Reply(prompt, decode(answer.tokens), len(answer.tokens), answer.finished, question.row)


def pieces_of(ids: np.ndarray, decode: Callable[[np.ndarray], str]) -> list[str]:
    """The text that each token adds to those before it; "" for all but the last token of a character."""
    pieces = []
    for i in range(len(ids)):
        near = ids[max(0, i - CONTEXT) : i]
        before = decode(near).rstrip(UNFINISHED) if len(near) else ""
        after = decode(ids[i - len(near) : i + 1]).rstrip(UNFINISHED)
        pieces.append(after[len(before) :])
    return pieces


class TextStream:
    """The text of an answer as its tokens come: what `update` returns is never taken back.

    All tokens are decoded again at every update, since what a piece stands for depends on its neighbours: a character
    may have several tokens, and SentencePiece drops the space before the first word.

    Args:
        decode: token ids to text.
    """

    def __init__(self, decode: Callable[[np.ndarray], str]) -> None:
        self._decode, self._shown = decode, ""

    def update(self, tokens: np.ndarray, *, final: bool = False) -> str:
        """The text to add, given all tokens so far; `final`: no more will come."""
        text = self._decode(tokens)
        if not final:
            text = _settled(text)
        if not text.startswith(self._shown):  # rewritten by the decoder: show the answer anew, at its end
            return f"\n{text}" if final else ""
        new, self._shown = text[len(self._shown) :], text
        return new


def _settled(text: str) -> str:
    """The beginning of a text that later tokens cannot change."""
    text = text.rstrip(UNFINISHED)
    space = text.rfind(" ", max(0, len(text) - HELD_BACK))
    return text if space < 0 else text[:space]
