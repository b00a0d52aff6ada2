"""Pieces of text to token ids: each piece as the continuation of those before it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from jaxsteer.io import Tokenizer

CONTEXT = 48
"""Characters before a piece that its tokens may depend on: more than the longest special token."""

_ANCHORS = ("\n", "a")
"""Texts after which a continuation is a text of its own; hardly any token spans both kinds of boundary."""


class Piece(NamedTuple):
    """A part of an example's text, and what it is for."""

    text: str
    kind: Literal["prompt", "completion", "text"]


class Pieces(NamedTuple):
    """Token ids of each piece of an example, and whether a token of the whole text would have spanned two of them."""

    ids: list[list[int]]
    straddled: bool


def tokenise(examples: Sequence[Sequence[Piece]], tokenizer: Tokenizer) -> list[Pieces]:
    """Tokenise each piece as what follows the pieces before it, without changing their ids.

    A piece gets the tokens that it has in the whole text. So a tokenizer that marks the beginning of a text
    (SentencePiece's "▁") marks it once, and the ids of a prompt are the same with and without a completion. Where a
    token of the whole text would span two pieces, the earlier keeps its ids, and the later is tokenised as it would be
    after a line break.

    Args:
        examples: the pieces of each.
        tokenizer: a fast transformers tokenizer. What it adds to a text (its beginning) is left out.
    """
    whole = "|".join(re.escape(str(token.content)) for token in tokenizer.added_tokens_decoder.values())
    split = [list(_in_context(pieces, re.compile(whole or "$^"))) for pieces in examples]
    flat = [pair for pairs in split for pair in pairs]
    found = _continuations(flat, tokenizer)
    failed = [pair for pair in flat if found[pair] is None]
    rescued = _alone([text for _, text in failed], tokenizer) if failed else {}
    return [
        Pieces(
            [rescued[pair[1]] if (ids := found[pair]) is None else ids for pair in pairs],
            any(found[pair] is None for pair in pairs),
        )
        for pairs in split
    ]


def _in_context(pieces: Sequence[Piece], token: re.Pattern[str]) -> Iterator[tuple[str, str]]:
    """(the end of what comes before, the text) of each piece; a token that is matched whole separates texts."""
    before = ""
    for piece in pieces:
        yield before, piece.text
        before = (before + piece.text)[-CONTEXT:]
        before = before[max((found.start() for found in token.finditer(before)), default=0) :]


def _continuations(pairs: Sequence[tuple[str, str]], tokenizer: Tokenizer) -> dict[tuple[str, str], list[int] | None]:
    """The ids of each text after what comes before it; None where a token would span the two."""
    texts = list(dict.fromkeys(text for before, after in pairs for text in (before, before + after) if text))
    ids = {"": list[int](), **dict(zip(texts, _ids(texts, tokenizer), strict=True))}
    found: dict[tuple[str, str], list[int] | None] = {}
    for pair in pairs:
        first, whole = ids[pair[0]], ids["".join(pair)]
        found[pair] = whole[len(first) :] if whole[: len(first)] == first else None
    return found


def _alone(texts: Sequence[str], tokenizer: Tokenizer) -> dict[str, list[int]]:
    """The ids of texts that continue something, whatever it is."""
    found = dict(zip(texts, _ids(texts, tokenizer), strict=True))
    if _marks_beginnings(tokenizer):
        for anchor in reversed(_ANCHORS):
            after = _continuations([(anchor, text) for text in texts], tokenizer)
            found |= {text: ids for (_, text), ids in after.items() if ids is not None}
    return found


def _marks_beginnings(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer treats the beginning of a text differently from its middle."""
    [after] = _continuations([("\n", "x")], tokenizer).values()
    return after != _ids(["x"], tokenizer)[0]


def _ids(texts: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """The ids of each text by itself. A fast tokenizer processes a list in parallel."""
    if not texts:
        return []
    tokenizer("", add_special_tokens=False)  # switches off truncation and padding that its file may ask for
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [each.ids for each in encoded]
