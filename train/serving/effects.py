"""What steering does to each token of a prompt and its answer, for people to look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jaxsteer.adapters import Adapters
from jaxsteer.batches import Tokens, bucket_length, stack_rows
from jaxsteer.inference.draws import TOP
from jaxsteer.inference.scheduling import nonfinite_logits
from jaxsteer.inference.scores import TokenScores
from jaxsteer.inference.token_shift import TokenShift, per_token_shift
from jaxsteer.models.config import check_length
from jaxsteer.models.transformer import Network
from train.data.examples import TokenizedExample
from train.evaluation.replies import UNFINISHED
from train.serving.models import Served, UnknownModel
from train.serving.text import Alternative, Decode, pieces

SHORTEST = 64
"""Texts are padded to a `bucket_length` of at least this, each of which is compiled once."""

Part = Literal["prompt", "answer"]


@dataclass(frozen=True)
class Passage:
    """A prompt and an answer to it, and how they are steered.

    served    the model that is asked about
    prompt    at least one token, as for `Request.prompt`
    answer    int32 [n], its token ids; there may be none
    strength  of the slots of the model's own plan, see `Served.strength`
    top       number of likeliest tokens, up to 20
    """

    served: Served
    prompt: Tokens
    answer: np.ndarray
    strength: Mapping[str, float] = field(default_factory=dict)
    top: int = 5

    def __post_init__(self) -> None:
        """Reject what there is nothing to say about."""
        if not len(self.prompt.ids):
            raise ValueError(f"{self.prompt.source}: an empty prompt; there is no token to look at")
        if not 0 <= self.top <= TOP:
            raise ValueError(f"{self.prompt.source}: top must be from 0 to {TOP} likeliest tokens, got {self.top}")

    @property
    def tokens(self) -> TokenizedExample:
        """Prompt and answer as one example."""
        prompt, answer = self.prompt, np.asarray(self.answer, np.int32)
        return TokenizedExample(
            ids=np.concatenate([np.asarray(prompt.ids, np.int32), answer]),
            completion=np.concatenate([np.asarray(prompt.completion, bool), np.ones(len(answer), bool)]),
            prompt_length=min(prompt.prompt_length, len(prompt.ids)),
            source=prompt.source,
        )


class TokenEffect(NamedTuple):
    """What steering does to one token.

    id                    of the token
    text                  what it adds to the text before it; the texts of all tokens make the whole
    part                  "prompt" or "answer"
    shift                 ‖h_steered − h‖ / ‖h‖ of the residual stream after each block, fp32 [L]
    log_probability       natural logarithm of its probability given the tokens before it; None for the first
    log_probability_base  the same without steering
    top                   the likeliest tokens in its place, likeliest first; empty for the first
    top_base              the same without steering
    """

    id: int
    text: str
    part: Part
    shift: np.ndarray
    log_probability: float | None
    log_probability_base: float | None
    top: tuple[Alternative, ...]
    top_base: tuple[Alternative, ...]


class Effects(NamedTuple):
    """What steering does to a prompt and its answer.

    tokens  of both, in order
    shift   of all of them, fp32 [L, T], see `TokenEffect`
    """

    tokens: tuple[TokenEffect, ...]
    shift: np.ndarray


def effects(network: Network, adapters: Adapters | None, passage: Passage, decode: Decode) -> Effects:
    """Compare a steered model with its base on every token of a passage; for `Engine.run`.

    Args:
        network: the model with all its weights.
        adapters: stacked in its steering; None if there are none.
        passage: what is looked at.
        decode: token ids to text, special tokens included.

    Raises:
        UnknownModel: the adapter was unloaded.
        ValueError: a strength for a slot that the model's plan does not have, or more tokens than the model has
            learned positions for.
        FloatingPointError: the model's logits are not finite.
    """
    tokens = passage.tokens
    check_length(network.model.config, len(tokens), tokens.source)
    found = _compare(network, tokens, _steered(network, adapters, passage))
    ids, shift, added = tokens.ids.tolist(), np.asarray(found.shift), _added(decode)

    def effect(t: int, piece: str) -> TokenEffect:
        part: Part = "prompt" if t < len(passage.prompt.ids) else "answer"
        if t == 0:
            return TokenEffect(ids[t], piece, part, shift[:, t], None, None, (), ())
        instead = lambda id: added(ids[t - 1], id)
        (p, top), (p_base, top_base) = (_at(each, t, passage.top, instead) for each in (found.steered, found.base))
        return TokenEffect(ids[t], piece, part, shift[:, t], p, p_base, top, top_base)

    return Effects(tuple(effect(t, piece) for t, piece in enumerate(pieces(ids, decode))), shift)


def _steered(network: Network, adapters: Adapters | None, passage: Passage) -> dict[str, Any]:
    """Strength and adapter as arguments of `forward`, always of the same types: other values compile nothing."""
    served, there = passage.served, () if adapters is None else adapters.names
    if served.adapter is not None and served.adapter not in there:
        raise UnknownModel(f"{served.name!r} is no longer served; it was unloaded meanwhile")
    if unknown := sorted(set(passage.strength) - {slot.name for slot in served.plan}):
        raise ValueError(f"strength: no slot {unknown}; {served.name!r} has {[slot.name for slot in served.plan]}")
    if adapters is None:
        return {}
    common = adapters.slot_names(served.plan)
    factors = {common[name]: value for name, value in passage.strength.items()}
    return {
        "strength": {slot.name: np.float32(factors.get(slot.name, 1.0)) for slot in network.model.plan},
        "adapters": np.array([adapters.index(served.adapter)], np.int32),
    }


def _compare(network: Network, tokens: TokenizedExample, steered: Mapping[str, Any]) -> TokenShift:
    """The shift of each token, in numpy and without padding, [L, T] and [T, ...]."""
    batch = stack_rows([[tokens]], bucket_length(len(tokens), SHORTEST))
    found = per_token_shift(network.model, network.base, network.steering, batch, top=TOP, **steered)
    shift, scores, base = jax.device_get(found)
    row = lambda each: jax.tree.map(lambda field: field[0, : len(tokens)], each)
    found = TokenShift(shift[:, 0, : len(tokens)], row(scores), row(base))
    if not all(np.isfinite(field).all() for field in (found.shift, found.change)):
        raise nonfinite_logits(tokens, network.model.config.vocab_size)
    return found


def _at(
    scores: TokenScores, t: int, count: int, text_of: Callable[[int], str]
) -> tuple[float, tuple[Alternative, ...]]:
    """The log-probability of token t and the `count` likeliest in its place, from all tokens' scores [T, ...]."""
    assert scores.top is not None
    pairs = zip(*(field[t, :count].tolist() for field in scores.top), strict=True)
    return float(scores.log_probability[t]), tuple(Alternative(id, text_of(id), value) for id, value in pairs)


def _added(decode: Decode) -> Callable[[int, int], str]:
    """What a token adds to the one before it, a function (before, id) -> text: some tokenizers drop a first space."""
    alone = cache(lambda id: decode([id]).rstrip(UNFINISHED))

    @cache
    def added(before: int, id: int) -> str:
        text = decode([before, id])[len(alone(before)) :]
        return text.strip(UNFINISHED) or text  # a part of a character alone shows as one

    return added
