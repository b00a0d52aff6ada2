"""The device side of reading prompts: several at once, or a long one in parts, into a cache of their own."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from jaxsteer.inference.draws import Drawing, draw_tokens, no_top
from jaxsteer.inference.rows import Admission, Progress, proceeded, replicate, steered
from jaxsteer.models.layers import KeysValues
from jaxsteer.models.transformer import Model, Network, forward, init_cache
from jaxsteer.sharding import constrain
from jaxsteer.types import Array, Batch, Cache


@jax.jit
def prefill(
    network: Network, prompts: Batch, strength: Array | None = None, adapters: Array | None = None
) -> tuple[Array, Cache]:
    """Hidden states [P, W, D] and cache of the prompts, several of which may share a row.

    Args:
        network: the model and its weights.
        prompts: [P, W].
        strength: of each slot at each token, fp32 [P, W, number of slots]; None = 1.
        adapters: with stacked steering, the index of each token's adapter, int32 [P, W].
    """
    slots = steered(network, strength, adapters)
    output = forward(network.model, network.base, network.steering, prompts, keep_cache=True, **slots)
    assert output.cache is not None
    return output.hidden, output.cache


@partial(jax.jit, donate_argnames="cache")
def read_part(
    network: Network,
    part: Batch,
    count: Array,
    cache: Cache,
    strength: Array | None = None,
    adapters: Array | None = None,
) -> tuple[Array, Cache]:
    """Hidden states [1, W, D] of a prompt's next tokens, and the cache with them.

    Args:
        network: the model and its weights.
        part: [1, W], the next tokens; what follows them is padding, or a look at the token after them.
        count: int32 [], how many tokens the cache keeps.
        cache: of the tokens before, with W free slots; donated.
        strength, adapters: as for `prefill`, [1, W, ...].
    """
    slots = steered(network, strength, adapters)
    output = forward(network.model, network.base, network.steering, part, cache=cache, **slots)
    assert output.cache is not None
    used = cache.used + count
    kept = jnp.arange(cache.segments.shape[1], dtype=jnp.int32)[None] < used
    segments = jnp.where(kept, output.cache.segments, 0)
    return output.hidden, _place_alone(output.cache._replace(segments=segments, used=used))


@partial(jax.jit, static_argnames=("model", "slots", "dtype"))
def empty_prompt(model: Model, slots: int, dtype: str) -> Cache:
    """The cache of a prompt of which nothing has been read."""
    return _place_alone(init_cache(model.config, 1, slots, dtype))


@partial(jax.jit, static_argnames="slots")
def resume_prompt(beginning: KeysValues, length: Array, slots: int) -> Cache:
    """The cache of a prompt whose first `length` tokens, int32 [], are those of one that was read before.

    Args:
        beginning: from `prompts_of`, of at least `length` tokens.
        length: int32 [].
        slots: of the cache (static).
    """
    here = jnp.arange(slots, dtype=jnp.int32)[None]
    real = here < length

    def fit(stack: Array) -> Array:
        stack = stack[:, :, :, :slots]
        return jnp.pad(stack, [(0, slots - stack.shape[3] if axis == 3 else 0) for axis in range(stack.ndim)])

    k, v = map(fit, beginning)
    return _place_alone(Cache(k, v, real.astype(jnp.int32), jnp.where(real, here, 0), jnp.int32(length)))


def _place_alone(cache: Cache) -> Cache:
    """On a mesh: one row on all devices, keys and values split by heads."""
    k, v = (constrain(stack, None, None, "heads", None, None) for stack in cache[:2])
    return Cache(k, v, *replicate(cache[2:]))


@partial(jax.jit, static_argnames="drawing")
def first_tokens(network: Network, hidden: Array, admission: Admission, drawing: Drawing) -> Progress:
    """Draw the first token of each answer.

    Args:
        network: the model and its weights.
        hidden: hidden states of the prompts, [P, W, D].
        admission: where their last tokens are.
        drawing: what any of the requests may ask for (static).
    """
    settings = admission.settings
    last = hidden[admission.source, admission.last]
    draw = draw_tokens(network, last, settings, jnp.zeros_like(admission.length), drawing)
    zeros, no = jnp.zeros_like(admission.length), jnp.zeros(admission.length.shape, bool)
    top = no_top(zeros.shape, network.model.config.vocab_size) if draw.top is None else draw.top
    floats = zeros.astype(jnp.float32)
    before = Progress(zeros, floats, admission.length - 1, zeros, no, no, floats + jnp.inf, no, top)
    return replicate(proceeded(before, settings, draw)[1])


@partial(jax.jit, static_argnames="slots")
def prompts_of(prefilled: Cache, source: Array, start: Array, length: Array, slots: int) -> KeysValues:
    """Keys and values of prompts, [L, n, K, slots, H], zeros behind their tokens.

    Args:
        prefilled: the cache in which they were read.
        source, start, length: int32 [n], as in `Admission`.
        slots: for each prompt (static), enough for the longest.
    """
    here = jnp.arange(slots, dtype=jnp.int32)[None]
    real = here < length[:, None]
    columns = jnp.minimum(start[:, None] + here, prefilled.segments.shape[1] - 1)
    window = lambda layer: jax.vmap(lambda source, at: layer[source][:, at])(source, columns)
    # Zeros behind the prompt: a NaN of a neighbour there would reach this row, since 0 · NaN is NaN.
    own = lambda layer: jnp.where(real[:, None, :, None], window(layer), jnp.zeros((), layer.dtype))
    split = lambda stack: constrain(stack, None, None, "heads", None, None)
    return KeysValues(*(split(jax.vmap(own)(stack)) for stack in prefilled[:2]))
