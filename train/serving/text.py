"""The text of an answer as its tokens come: characters that span tokens, stop strings, and the text of each token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from jaxsteer.inference.events import Event
from train.evaluation.replies import CONTEXT, UNFINISHED

Decode = Callable[[Sequence[int]], str]
"""Token ids to text: a tokenizer's `decode`."""

End = Literal["stop", "length"]
"""Why an answer ended: a stop token or stop string, or its maximum number of tokens."""

WINDOW = 64
"""Tokens that are decoded again for each new one, at most."""


class Alternative(NamedTuple):
    """One of the most likely tokens at a step: its id, its text there, and its natural log-probability."""

    id: int
    text: str
    log_probability: float


class Token(NamedTuple):
    """A token of an answer.

    id               of the token
    text             what it adds to the text before it: "" for all but the last token of a character. The texts of all
                     tokens make the text of the answer
    log_probability  natural logarithm, of the model's own distribution
    top              the most likely tokens there, likeliest first; empty if the request did not ask
    """

    id: int
    text: str
    log_probability: float
    top: tuple[Alternative, ...] = ()


class Delta(NamedTuple):
    """What an event adds to an answer.

    text      to append; never taken back
    tokens    that are complete with it; empty unless asked for
    finished  why the answer ended; None while it has not
    """

    text: str
    tokens: tuple[Token, ...] = ()
    finished: End | None = None


class TextOfAnswer:
    """Turns the events of a request into text.

    Nothing of a stop string is ever given out: text that may begin one is held back. The token in which it begins is
    cut there, or left out if nothing of it remains. What comes out does not depend on how tokens are divided into
    events.

    Args:
        decode: token ids to text; for answers `partial(tokenizer.decode, skip_special_tokens=True)`.
        stop: strings that end the answer, not part of it; the one that is complete first counts.
        tokens: whether each `Delta` has its tokens, which takes longer.

    Attributes:
        text: given out so far.
        generated: number of tokens generated so far, up to the one that completes a stop string.
        finished: why the answer ended; None while it has not. After a stop string, the reader cancels the job.
    """

    def __init__(self, decode: Decode, stop: Sequence[str] = (), *, tokens: bool = False) -> None:
        self.text, self.generated = "", 0
        self.finished: End | None = None
        self._pieces, self._stops = _Pieces(decode), tuple(filter(None, stop))
        self._held = ""  # text that may begin a stop string
        self._with_tokens = tokens
        self._waiting: list[Token] = []  # tokens whose text is not out yet
        self._waiting_from = 0  # where their text begins in that of the answer

    def push(self, event: Event) -> Delta:
        """The text to append after an event; nothing once the answer has `finished`.

        Raises:
            ValueError: the event is of an answer that was cancelled, or whose logits were not finite.
        """
        if event.finished in ("cancelled", "nonfinite"):
            raise ValueError(f"an answer that ended as {event.finished!r} has no text")
        if self.finished:
            return Delta("")
        start, ids = len(self.text), event.tokens.tolist()
        # One at a time where it matters which token a piece of text is from.
        each = [[i] for i in range(len(ids))] if self._with_tokens or self._stops else [range(len(ids))]
        for numbers in each:
            likeliest = self._likeliest(event, numbers[0]) if self._with_tokens else ()
            text = self._pieces.add([ids[i] for i in numbers])
            self.generated += len(numbers)
            if self._with_tokens:
                self._waiting.append(_token(event, numbers[0], text, likeliest))
            if self._release(text):
                self.finished = "stop"
                break
        if event.finished and not self.finished:
            self.finished = "stop" if self._end() or event.finished == "stop" else "length"
        return Delta(self.text[start:], self._complete(), self.finished)

    def _likeliest(self, event: Event, number: int) -> tuple[Alternative, ...]:
        """The most likely tokens in the place of the next one, in its context."""
        if event.top is None:
            return ()
        ids, log_probabilities = event.top.tokens[number].tolist(), event.top.log_probabilities[number].tolist()
        return tuple(map(Alternative, ids, self._pieces.instead(ids), log_probabilities))

    def _end(self) -> bool:
        """Give out what was held back, unless it is a stop string after all."""
        rest = self._pieces.rest()
        if rest and self._waiting:
            self._waiting[-1] = self._waiting[-1]._replace(text=self._waiting[-1].text + rest)
        if self._release(rest):
            return True
        self.text += self._held
        self._held = ""
        return False

    def _release(self, text: str) -> bool:
        """Give out new text as far as no stop string begins in it; whether one is complete."""
        self._held += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        kept = len(self._held) - min(found)[1] if found else self._may_begin_stop()
        out = len(self._held) - kept
        self.text += self._held[:out]
        self._held = "" if found else self._held[out:]
        return bool(found)

    def _may_begin_stop(self) -> int:
        """Length of the longest end of the held text with which a stop string begins."""
        longest = min(max(map(len, self._stops), default=1) - 1, len(self._held))
        ends = (n for n in range(longest, 0, -1) if any(stop.startswith(self._held[-n:]) for stop in self._stops))
        return next(ends, 0)

    def _complete(self) -> tuple[Token, ...]:
        """Take the tokens whose text is out. A token without text belongs to the next one that has some."""
        out, complete, ends = len(self.text), 0, self._waiting_from
        for number, token in enumerate(self._waiting, 1):
            ends += len(token.text)
            if token.text and ends <= out:
                complete, self._waiting_from = number, ends
        if self.finished:
            return self._last(complete, out)
        taken, self._waiting = self._waiting[:complete], self._waiting[complete:]
        return tuple(taken)

    def _last(self, complete: int, out: int) -> tuple[Token, ...]:
        """Take the last tokens, the one that reaches into a stop string cut where that begins."""
        taken, rest, self._waiting = self._waiting[:complete], self._waiting[complete:], []
        left = out - self._waiting_from
        if not any(token.text for token in rest):
            return tuple(taken + rest)
        while rest and left:
            token = rest.pop(0)
            taken.append(token._replace(text=token.text[:left]))
            left -= len(taken[-1].text)
        return tuple(taken)


def _token(event: Event, number: int, text: str, likeliest: Sequence[Alternative]) -> Token:
    """A token of an event; among the likeliest, it has the same text."""
    id, log_probability = int(event.tokens[number]), float(event.log_probabilities[number])
    top = tuple(each._replace(text=text) if each.id == id else each for each in likeliest)
    return Token(id, text, log_probability, top)


def pieces(ids: Sequence[int], decode: Decode) -> list[str]:
    """The text that each token adds to those before it; together they are the text of all."""
    window = _Pieces(decode)
    texts = [window.add([token]) for token in ids]
    if texts:
        texts[-1] += window.rest()
    return texts


class _Pieces:
    """The text that tokens add to those before them.

    Decoded are the last tokens together, since what a token stands for depends on its neighbours: a character may have
    several tokens, and SentencePiece drops the space before the first word.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._shown = ""  # their text that was given out

    def add(self, ids: Sequence[int]) -> str:
        """The text that these tokens add; the first bytes of a character wait for the others."""
        self._ids += ids
        text = self._decode(self._ids)
        settled = text.rstrip(UNFINISHED)
        if settled != text and not settled.startswith(self._shown):
            return ""  # bytes before the unfinished character are shown as unfinished too
        new = settled[len(self._shown) :]
        self._shown = settled if new else self._shown
        if len(self._ids) > WINDOW and settled == text:
            self._forget()
        return new

    def instead(self, ids: Sequence[int]) -> list[str]:
        """The text that each of these would add; the sign for a character unknown if that is less than a character."""
        near = self._ids[-CONTEXT:]
        before = self._decode(near).rstrip(UNFINISHED)
        texts = [self._decode([*near, id]) for id in ids]
        return [text[len(before) :] if text.startswith(before) else UNFINISHED for text in texts]

    def rest(self) -> str:
        """What is left at the end: a character of which only the first bytes came."""
        text = self._decode(self._ids)
        return text[len(self._shown) :] if text.startswith(self._shown) else ""

    def _forget(self) -> None:
        """Go on with the last tokens only, if their text does not depend on those before them."""
        text = self._decode(self._ids[-CONTEXT:])
        if text and self._shown.endswith(text):
            self._ids, self._shown = self._ids[-CONTEXT:], text
