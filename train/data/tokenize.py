"""Encoding: examples to token ids, with the same prompt-completion boundary in training and in generation.

The ids of a prompt are a prefix of the ids of the example, whatever is said after it; see `train.data.pieces`. If a
token could span the boundary, the model would be trained on prompt ids that generation never starts from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from jaxsteer.io import Tokenizer
from jaxsteer.io.tokenizer import beginning_of
from train.data.chat import chat_of, chat_pieces, end_of_turn, special_ids
from train.data.columns import Columns, Row
from train.data.encoding import PLAIN, Encoding, LossOn, Report
from train.data.examples import Example, Run, TokenizedExample, Turn
from train.data.pieces import Piece, tokenise
from train.data.store import TokenStore, within

_NO_END = "the tokenizer has no end-of-sequence token to end a completion; set tokenizer.eos_token"

CHUNK = 2_000
"""Examples per call of the tokenizer: enough to keep its threads busy, few enough for a smooth progress bar."""


def encode(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    encoding: Encoding = PLAIN,
    *,
    advance: Callable[[int], None] = lambda done: None,
) -> tuple[list[TokenizedExample], Report]:
    """Encode examples for training.

    Plain text: the beginning-of-sequence ids that the tokenizer adds, if any, then the turns; every completion, and
    every text, is followed by the end-of-sequence token, which is a target too. Neither is added where the text has it
    already. Chat: the tokenizer's chat template, with a plain prompt as the user's message; every assistant turn is
    supervised, up to and including its end-of-turn token. A text never goes through the template.

    Args:
        examples: each with at least one target.
        tokenizer: a fast transformers tokenizer.
        encoding: how.
        advance: callback, called with the number of examples encoded so far.

    Returns:
        The examples kept, in order, and statistics. `completion` marks exactly the supervised tokens. A target's weight
        in the loss is that of its example; other tokens' is 0.

    Raises:
        ValueError: naming the example: chat roles without `chat`; no target; nothing before the first target; a chat
            template that is not prefix-stable or does not end its turns; a weight that is not finite; too long.
    """
    return _encode(examples, tokenizer, encoding, generate=False, advance=advance)


def encode_prompts(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    encoding: Encoding = PLAIN,
) -> tuple[list[TokenizedExample], Report]:
    """Encode what generation starts from: each example without its final supervised turn.

    The ids are a prefix of the ids that `encode` gives for the same example. Earlier assistant turns are marked as
    completion, as in training. See `encode` for the arguments and errors.
    """
    return _encode([example.context for example in examples], tokenizer, encoding, generate=True)


def stop_tokens(
    tokenizer: Tokenizer,
    encoding: Encoding = PLAIN,
) -> tuple[int, ...]:
    """Ids that end a generated text: the end-of-sequence token and, for a chat, the template's end-of-turn token.

    Raises:
        ValueError: the tokenizer has neither.
    """
    stops = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if encoding.chat:
        turns = Example((Turn("user", "a"), Turn("assistant", "b")), "chat template")
        unlimited = replace(encoding, max_length=None, loss_on="completion")
        stops.append(int(encode([turns], tokenizer, unlimited)[0][0].ids[-1]))
    if not stops:
        raise ValueError(_NO_END)
    return tuple(dict.fromkeys(stops))


def _encode(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    encoding: Encoding,
    *,
    generate: bool,
    advance: Callable[[int], None] = lambda done: None,
) -> tuple[list[TokenizedExample], Report]:
    """`encode`, or `encode_prompts` with `generate`."""
    if not examples:
        raise ValueError("no examples to tokenise")
    rows = list[Row]()
    for first in range(0, len(examples), CHUNK):
        rows += encode_rows(examples[first : first + CHUNK], tokenizer, encoding, generate=generate)
        advance(len(rows))
    store, report = within(TokenStore.whole([Columns.of(rows)]), encoding, len(beginning_of(tokenizer)))
    return list(store), report


def encode_rows(
    examples: Sequence[Example], tokenizer: Tokenizer, encoding: Encoding, *, generate: bool = False
) -> list[Row]:
    """The tokens of at most `CHUNK` examples, of any length, before they are put into columns.

    Args:
        examples, tokenizer: as in `encode`.
        encoding: how; its maximum length does not matter.
        generate: leave the end of an example open for a reply.
    """
    return list(_tokenised(examples, encoding.dated(tokenizer), _marks_of(tokenizer), generate))


BEGUN, ENDED, STRADDLED = 1, 2, 4
"""What the report counts, of one example: the bits of `Row.notes`."""


@dataclass(frozen=True)
class _Marks:
    """A tokenizer, the ids with which it begins a text, the id that ends one, and all special ids."""

    tokenizer: Tokenizer
    beginning: list[int]
    end: int | None
    specials: frozenset[int]


def _marks_of(tokenizer: Tokenizer) -> _Marks:
    end = tokenizer.eos_token_id
    return _Marks(tokenizer, beginning_of(tokenizer), None if end is None else int(end), special_ids(tokenizer))


def _tokenised(examples: Sequence[Example], encoding: Encoding, marks: _Marks, generate: bool) -> Iterator[Row]:
    """Yield each example's tokens, and what there is to report of it."""
    talks = [encoding.chat and any(turn.role != "text" for turn in example.turns) for example in examples]
    first = next((example for example, talk in zip(examples, talks, strict=True) if talk), None)
    template = None if first is None else chat_of(marks.tokenizer, first, encoding.date)
    pieces = [
        chat_pieces(example, template, generate) if template and talk else _plain_pieces(example)
        for example, talk in zip(examples, talks, strict=True)
    ]
    try:
        tokens = tokenise(pieces, marks.tokenizer)
    except TypeError:  # all that `tokenizers` says of text that is not Unicode
        _check_unicode(examples)
        raise
    for example, talk, kinds, found in zip(examples, talks, pieces, tokens, strict=True):
        begun = not talk and bool(marks.beginning) and found.ids[0][: len(marks.beginning)] == marks.beginning
        spans = [_Span([] if talk or begun else marks.beginning)]
        of_turns = zip(example.turns, example.turn_weights, strict=False)
        of_replies = (weight for turn, weight in of_turns if turn.supervised)
        for piece, ids in zip(kinds, found.ids, strict=True):
            if piece.kind == "prompt" or (generate and piece.kind == "text"):
                spans.append(_Span(ids, learned=piece.kind == "text"))
            elif talk:
                spans.append(_reply(ids, marks, example.source)._replace(weight=next(of_replies, 1.0)))
            else:
                spans.append(_completion(ids, marks, piece.kind == "completion"))
        notes = BEGUN * begun + ENDED * any(span.ended for span in spans) + STRADDLED * found.straddled
        yield _to_row(example, spans, encoding.loss_on, generate, notes)


class _Span(NamedTuple):
    """Tokens of a piece: how many of them, from the first, are a completion; whether they are targets; whether the
    piece had its end token already; the weight of the completion among the example's turns."""

    ids: list[int]
    completion: int = 0
    learned: bool = False
    ended: bool = False
    weight: float = 1.0


def _completion(ids: list[int], marks: _Marks, completion: bool) -> _Span:
    """A plain completion or text, with the end token."""
    if marks.end is None:
        raise ValueError(_NO_END)
    closed = _ended_once([*ids, marks.end], marks.tokenizer)
    return _Span(closed, len(closed) if completion else 0, not completion, ended=len(closed) <= len(ids))


def _reply(ids: list[int], marks: _Marks, source: str) -> _Span:
    """An assistant's turn; what its template writes after the end-of-turn token is not supervised."""
    end = end_of_turn(ids, marks.tokenizer, marks.specials, source)
    closed = _ended_once(ids[:end], marks.tokenizer)
    return _Span(closed + ids[end:], len(closed), ended=len(closed) < end)


def _ended_once(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """The ids, without what follows the first end token (their last id) if it is only white space and end tokens."""
    end = ids[-1]
    if ids.count(end) == 1:
        return ids
    kept = len(ids)
    for i in range(len(ids) - 1, -1, -1):
        if ids[i] == end:
            kept = i + 1
        elif tokenizer.decode([ids[i]]).strip():
            break
    return ids[:kept]


def _to_row(example: Example, spans: Sequence[_Span], loss_on: LossOn, generate: bool, notes: int) -> Row:
    """The tokens of one example, checked."""
    if not math.isfinite(example.weight):
        raise ValueError(f"{example.source}: the weight is {example.weight}, need a finite number")
    tokens, runs = list[int](), [Run(0, False, 0.0)]
    prompt_length, end, everywhere = None, 0, loss_on == "all"
    for span in spans:
        if span.completion and prompt_length is None:
            prompt_length = len(tokens)
        tokens += span.ids
        rest = len(span.ids) - span.completion
        runs += [
            Run(span.completion, True, span.weight),
            Run(rest, False, float(span.learned or everywhere)),
        ]
        if span.completion or span.learned:
            end = len(tokens) if span.learned else len(tokens) - rest
    if not generate and prompt_length is None and (len(tokens) if everywhere else end) < 2:
        raise ValueError(f"{example.source}: nothing to train on; no completion, no assistant turn and no text")
    prompt_length = len(tokens) if prompt_length is None else prompt_length
    if prompt_length == 0:
        raise ValueError(
            f"{example.source}: the prompt is empty and the tokenizer adds no beginning-of-sequence token, so "
            "there is nothing to predict the first token from"
        )
    if end and not generate:
        # Whatever a template writes after the last end of turn (a newline) predicts nothing.
        tokens = tokens[:end]
    runs = _tidied(runs, len(tokens), example.weight)
    return Row(np.array(tokens, np.int32), runs, prompt_length, example.source, example.gold, notes)


def _tidied(runs: Sequence[Run], length: int, factor: float) -> list[Run]:
    """Runs that cover `length` tokens and differ from their neighbours, their weights multiplied by an example's."""
    tidy, left = [Run(1, False, 0.0)], length - 1  # nothing predicts the first token, which belongs to a prompt
    skip = 1
    for run in runs:
        count = min(run.length - (skipped := min(skip, run.length)), left)
        skip, left = skip - skipped, left - count
        weight = float(np.float32(run.weight) * np.float32(factor))
        if not count:
            continue
        if (tidy[-1].completion, tidy[-1].weight) == (run.completion, weight):
            tidy[-1] = Run(tidy[-1].length + count, *tidy[-1][1:])
        else:
            tidy.append(Run(count, run.completion, weight))
    return tidy


def _plain_pieces(example: Example) -> list[Piece]:
    """The turns of an example without a chat template."""
    pieces = []
    for turn in example.turns:
        if turn.role not in ("prompt", "completion", "text"):
            raise ValueError(f"{example.source}: has a {turn.role!r} message, which needs --task.chat")
        pieces.append(Piece(turn.text, turn.role))
    return pieces


def _check_unicode(examples: Sequence[Example]) -> None:
    """Raise ValueError for the first text that is not Unicode."""
    for example in examples:
        for turn in example.turns:
            try:
                turn.text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"{example.source}: the {turn.role} is no Unicode text: character {error.start} is half of a pair "
                    f"({turn.text[error.start]!r})"
                ) from None
