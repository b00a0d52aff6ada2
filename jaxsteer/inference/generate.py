"""Decoding one batch: one batched prefill, then cached steps in one jitted loop that ends when every row has."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxsteer.inference.draws import GREEDY, Sampling, next_logits, sample
from jaxsteer.models.by_layer import layers_to_decode, split_cache
from jaxsteer.models.config import check_new_tokens
from jaxsteer.models.transformer import Model, Network, forward
from jaxsteer.types import Array, Batch, Cache, PyTree, Steering


class Generated(NamedTuple):
    """Continuations of a batch.

    tokens   int32 [B, M], 0 after the end of a row
    lengths  int32 [B], without the stop token
    stopped  bool [B], False for a row that reached M tokens without a stop token
    finite   bool [B], False for a row that ended because the model's logits were not finite
    """

    tokens: Array
    lengths: Array
    stopped: Array
    finite: Array


def to_device(batch: Batch) -> Batch:
    """A numpy batch on the default device."""
    return jax.tree.map(jnp.asarray, batch)


def more_slots(cache: Cache, slots: int) -> Cache:
    """The cache with `slots` empty slots appended to each row."""
    wider = lambda x, axis: jnp.pad(x, [(0, slots if i == axis else 0) for i in range(x.ndim)])
    return Cache(wider(cache.k, 3), wider(cache.v, 3), wider(cache.segments, 1), wider(cache.positions, 1), cache.used)


def generate(
    model: Model,
    base: PyTree,
    steering: Steering,
    prompts: Batch,
    key: Array | None = None,
    *,
    max_new_tokens: int,
    stop_tokens: tuple[int, ...],
    sampling: Sampling = GREEDY,
    strength: Mapping[str, ArrayLike] | None = None,
    adapters: ArrayLike | None = None,
) -> Generated:
    """Continue the prompt in each row. Generated tokens count as completion for the plan's token selection.

    Args:
        model, base, steering: as in `forward`.
        prompts: one prompt per row, padded on either side; a row without tokens generates nothing. Their
            prompt_lengths count every token before the first completion token, as in training.
        key: random key; required unless decoding greedily.
        max_new_tokens: M, the maximum number of tokens per row.
        stop_tokens: token ids that end a row.
        sampling: how tokens are chosen, the same for every row.
        strength: of the slots, [] or one for each row [B], as in `forward`.
        adapters: with stacked steering, the index of each row's adapter, int [B], as in `forward`.

    Returns:
        The continuations.

    Raises:
        ValueError: `max_new_tokens` is below 1 or above the model's context, or there is no key to sample with.
    """
    check_new_tokens(model.config, max_new_tokens)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if key is None and sampling.temperature > 0:
        raise ValueError("sampling with a temperature above 0 needs a key")
    return generate_program(
        Network(model, base, steering),
        prompts,
        jax.random.key(0) if key is None else key,
        layers_to_decode(base),
        {"strength": strength, "adapters": adapters},
        max_new_tokens=max_new_tokens,
        stop_tokens=stop_tokens,
        sampling=sampling,
    )


@partial(jax.jit, static_argnames=("max_new_tokens", "stop_tokens", "sampling"))
def generate_program(
    network: Network,
    prompts: Batch,
    key: Array,
    layers: tuple[PyTree, ...] | None,
    steered: Mapping[str, Any],
    *,
    max_new_tokens: int,
    stop_tokens: tuple[int, ...],
    sampling: Sampling = GREEDY,
) -> Generated:
    """The compiled part of `generate`, whose arguments it takes.

    Args:
        network: model, base and steering.
        prompts, key, max_new_tokens, stop_tokens, sampling: as there.
        layers: the base's blocks as a tuple, which the steps read in place; None = scan over them.
        steered: further arguments of `forward`, strength and adapters.
    """
    model, base, steering = network.model, network.base, network.steering
    stepping = base if layers is None else {**base, "blocks": layers}
    B, T = prompts.tokens.shape
    stops = jnp.array(stop_tokens, jnp.int32)
    real = prompts.segments > 0
    column = jnp.max(jnp.where(real, jnp.arange(T, dtype=jnp.int32)[None], 0), axis=1)[:, None]
    last: Batch = jax.tree.map(lambda field: jnp.take_along_axis(field, column, axis=1), prompts)  # last tokens, [B, 1]
    generated = last._replace(completion=jnp.ones((B, 1), bool), weights=jnp.zeros((B, 1), jnp.float32))

    def draw(hidden: Array, step: Array, out: Generated) -> tuple[Array, Generated]:  # hidden [B, D]
        logits = next_logits(base, hidden, model.config.final_softcap)
        token = sample(logits, sampling, jax.random.fold_in(key, step))
        finite = jnp.isfinite(jnp.max(logits, axis=-1))  # the largest of logits with a NaN is the NaN
        active = ~out.stopped & out.finite
        finite, stopped = out.finite & (finite | ~active), out.stopped | (active & finite & jnp.isin(token, stops))
        ended = stopped | ~finite
        token = jnp.where(ended, 0, token)
        lengths = out.lengths + (~ended).astype(jnp.int32)
        return token, Generated(out.tokens.at[:, step].set(token), lengths, stopped, finite)

    def unfinished(carry: tuple) -> Array:
        step, *_, out = carry
        return (step < max_new_tokens) & ~jnp.all(out.stopped | ~out.finite)

    def advance(carry: tuple) -> tuple:
        step, token, position, cache, out = carry
        batch = generated._replace(tokens=token[:, None], positions=position)
        output = forward(model, stepping, steering, batch, cache=cache, **steered)
        token, out = draw(output.hidden[:, 0], step, out)
        return step + 1, token, position + 1, output.cache, out

    prefill = forward(model, base, steering, prompts, keep_cache=True, **steered)
    assert prefill.cache is not None
    hidden = jnp.take_along_axis(prefill.hidden, column[:, None], axis=1)[:, 0]
    tokens, lengths = jnp.zeros((B, max_new_tokens), jnp.int32), jnp.zeros(B, jnp.int32)
    nothing = Generated(tokens, lengths, ~jnp.any(real, axis=1), jnp.ones(B, bool))
    token, out = draw(hidden, jnp.zeros((), jnp.int32), nothing)
    cache = more_slots(prefill.cache, max_new_tokens - 1)
    cache = cache if layers is None else split_cache(cache)
    start = (jnp.ones((), jnp.int32), token, last.positions + 1, cache, out)
    return jax.lax.while_loop(unfinished, advance, start)[-1]
