"""Decoding: one batched prefill, then cached steps in one jitted loop that stops when every row has."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxsteer.models.transformer import Model, forward, logits_of, output_embedding
from jaxsteer.types import Array, Batch, Cache, PyTree, Steering


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    temperature  0 = greedy (the most likely token); otherwise logits are divided by it
    top_k        only the k most likely tokens; 0 = all
    top_p        only the most likely tokens that together have this probability; 1 = all
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Reject what no distribution could be drawn from."""
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"sampling: temperature >= 0, top_k >= 0 and 0 < top_p <= 1 are needed; got {self.temperature}, "
                f"{self.top_k}, {self.top_p}"
            )


class Generated(NamedTuple):
    """tokens int32 [B, M], a row's after its end being 0 · lengths int32 [B], the stop token not counted · stopped
    bool [B], False where the row ran out of its M tokens.
    """

    tokens: Array
    lengths: Array
    stopped: Array


def sample(logits: Array, sampling: Sampling, key: Array) -> Array:
    """Draw a token from logits [B, V] -> int32 [B]. Temperature first, then top-k, then top-p of what is left."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if sampling.top_p < 1:
        ranked = jnp.sort(logits, axis=-1, descending=True)
        probability = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability  # of the tokens ranked above
        least = jnp.min(jnp.where(before < sampling.top_p, ranked, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def more_slots(cache: Cache, slots: int) -> Cache:
    """The cache with so many empty slots behind those that it has."""
    wider = lambda x, axis: jnp.pad(x, [(0, slots if i == axis else 0) for i in range(x.ndim)])
    return Cache(wider(cache.k, 3), wider(cache.v, 3), wider(cache.segments, 1), wider(cache.positions, 1), cache.used)


@partial(jax.jit, static_argnames=("model", "max_new_tokens", "stop_tokens", "sampling"))
def generate(
    model: Model,
    base: PyTree,
    steering: Steering,
    prompts: Batch,
    key: Array | None = None,
    *,
    max_new_tokens: int,
    stop_tokens: tuple[int, ...],
    sampling: Sampling = Sampling(),  # frozen
) -> Generated:
    """Continue each row's prompt. Generated tokens count as completion for the plan's token selection.

    Args:
        prompts: one prompt a row, padded on either side; a row without tokens generates nothing. Their
            prompt_lengths count every token before the first supervised one, as in training.
        key: needed unless greedy.
        max_new_tokens: M. stop_tokens: ids that end a row.

    Raises:
        ValueError: fewer than 1 new token, or sampling without a key.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if key is None:
        if sampling.temperature > 0:
            raise ValueError("sampling with a temperature above 0 needs a key")
        key = jax.random.key(0)
    B, T = prompts.tokens.shape
    head = output_embedding(base)
    stops = jnp.array(stop_tokens, jnp.int32)
    real = prompts.segments > 0
    last = jnp.max(jnp.where(real, jnp.arange(T, dtype=jnp.int32)[None], 0), axis=1)  # [B], column of the last token
    at_last = lambda field: jnp.take_along_axis(field, last[:, None], axis=1)
    segments, prompt_lengths = at_last(prompts.segments), at_last(prompts.prompt_lengths)

    def draw(hidden: Array, step: Array, out: Generated) -> tuple[Array, Generated]:  # hidden [B, D]
        token = sample(logits_of(hidden, head, model.config.final_softcap), sampling, jax.random.fold_in(key, step))
        stopped = out.stopped | jnp.isin(token, stops)
        token = jnp.where(stopped, 0, token)
        return token, Generated(out.tokens.at[:, step].set(token), out.lengths + (~stopped).astype(jnp.int32), stopped)

    def going(carry: tuple) -> Array:
        step, *_, out = carry
        return (step < max_new_tokens) & ~jnp.all(out.stopped)

    def advance(carry: tuple) -> tuple:
        step, token, position, cache, out = carry
        completion, weights = jnp.ones((B, 1), bool), jnp.zeros((B, 1), jnp.float32)
        one = Batch(token[:, None], segments, position, prompt_lengths, completion, weights)
        output = forward(model, base, steering, one, cache=cache)
        token, out = draw(output.hidden[:, 0], step, out)
        return step + 1, token, position + 1, output.cache, out

    prefill = forward(model, base, steering, prompts, keep_cache=True)
    assert prefill.cache is not None
    hidden = jnp.take_along_axis(prefill.hidden, last[:, None, None], axis=1)[:, 0]
    empty = ~jnp.any(real, axis=1)
    none = Generated(jnp.zeros((B, max_new_tokens), jnp.int32), jnp.zeros(B, jnp.int32), empty)
    token, out = draw(hidden, jnp.zeros((), jnp.int32), none)
    start = (
        jnp.ones((), jnp.int32),
        token,
        at_last(prompts.positions) + 1,
        more_slots(prefill.cache, max_new_tokens - 1),
        out,
    )
    return jax.lax.while_loop(going, advance, start)[-1]
