"""Log-probabilities of the tokens of a text, and the likeliest tokens in place of each."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxsteer.inference.draws import Top, likeliest_tokens, log_total_of, no_top
from jaxsteer.models.transformer import Model, forward, logits_of, output_embedding
from jaxsteer.objectives.tokens import chunk_width, next_tokens, scan_counted
from jaxsteer.sharding import constrain
from jaxsteer.types import Array, Batch, PyTree, Steering


class TokenScores(NamedTuple):
    """Each token of a batch given those before it; 0 at padding and at the first of an example, which nothing predicts.

    log_probability  fp32 [B, T], natural logarithm; NaN where the logits are not finite
    top              the likeliest tokens in its place, [B, T, K]; None for K = 0
    """

    log_probability: Array
    top: Top | None


@partial(jax.jit, static_argnames=("model", "top"))
def score_tokens(
    model: Model,
    base: PyTree,
    steering: Steering,
    batch: Batch,
    *,
    strength: Mapping[str, ArrayLike] | None = None,
    adapters: ArrayLike | None = None,
    top: int = 0,
) -> TokenScores:
    """log p(token | those before it) of every token, in one forward pass.

    Args:
        model, base, steering: as in `forward`.
        batch: [B, T], packed, or padded on either side.
        strength: of the slots, as in `forward`.
        adapters: with stacked steering, the index of each row's or token's adapter, as in `forward`.
        top: K, the number of likeliest tokens; at most V are given.
    """
    output = forward(model, base, steering, batch, strength=strength, adapters=adapters)
    return score_hidden(model, base, output.hidden, batch, top)


def score_hidden(model: Model, base: PyTree, hidden: Array, batch: Batch, top: int) -> TokenScores:
    """`score_tokens` from the final hidden states [B, T, D]."""
    B, T, D = hidden.shape
    hidden, softcap = constrain(hidden, "rows", None, None), model.config.final_softcap
    head = constrain(output_embedding(base), "vocab", None)  # gathered once, not for every chunk
    following = next_tokens(batch._replace(weights=jnp.ones(batch.tokens.shape, jnp.float32)))
    row = jnp.arange(B)[:, None]

    def visit(scores: TokenScores, index: Array, mask: Array) -> TokenScores:
        h = jnp.take_along_axis(hidden, index[..., None], axis=1).reshape(-1, D)
        tokens = jnp.take_along_axis(following.tokens, index, axis=1).reshape(-1)
        found = _score_logits(logits_of(h, head, softcap), tokens, top)
        at = jnp.where(mask, index + 1, T)  # the score of a token is at the token; an index past the end is dropped
        put = lambda whole, new: whole.at[row, at].set(new.reshape(*at.shape, *new.shape[1:]), mode="drop")
        return jax.tree.map(put, scores, found)

    zeros = TokenScores(jnp.zeros((B, T), jnp.float32), no_top((B, T), len(head), top) if top else None)
    return scan_counted(visit, zeros, following.weights > 0, chunk_width(B, T))


def _score_logits(logits: Array, tokens: Array, top: int) -> TokenScores:
    """The scores of tokens [n] in their logits [n, V]."""
    highest = jnp.max(logits, axis=-1)
    log_total = log_total_of(logits, highest)
    at_token = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    log_probability = (at_token - highest - log_total).astype(jnp.float32)
    return TokenScores(log_probability, likeliest_tokens(logits, highest, log_total, top) if top else None)
