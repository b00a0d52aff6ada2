"""The device side of continuous batching: the rows being decoded, and the compiled programs that fill and advance them.

All shapes are static. A row's cache has one slot for each token of a prompt, followed by a ring: every step writes one
slot of the ring, the same one in all rows, whenever a row started. Which slots a row attends to follows from their
segments, so a new prompt takes over a row by overwriting its prompt slots and clearing the segments of its ring.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jaxsteer.inference.draws import NO_TOKEN, Draw, Drawing, Settings, Top, draw_tokens, is_stop, no_top
from jaxsteer.models.by_layer import put_rows, split_cache
from jaxsteer.models.layers import KeysValues
from jaxsteer.models.transformer import Model, Network, forward, init_cache
from jaxsteer.sharding import constrain
from jaxsteer.types import Array, Batch, Cache


class Progress(NamedTuple):
    """How far each row is, all [B].

    token            int32, the last token drawn, which the model has not read yet
    log_probability  fp32, of that token
    position         int32, index of that token in its example
    drawn            int32, tokens of the answer so far
    stopped          bool, whether a stop token was drawn
    done             bool, whether the row is free
    margin           fp32, smallest difference between the two largest logits so far
    failed           bool, whether the logits were not finite
    top              the likeliest tokens in place of the answer's first, [B, K]
    """

    token: Array
    log_probability: Array
    position: Array
    drawn: Array
    stopped: Array
    done: Array
    margin: Array
    failed: Array
    top: Top


@partial(jax.tree_util.register_dataclass, data_fields=["cache", "settings", "progress"], meta_fields=["ring"])
@dataclass(frozen=True)
class Rows:
    """The rows being decoded.

    cache     slots for the prompt's tokens, then `ring` slots for generated ones; `used` is the next slot to write
    settings  what each row's request asks for
    progress  how far each row is
    ring      slots of the ring (static), at least as many as steps that an active row has been decoded for
    """

    cache: Cache
    settings: Settings
    progress: Progress
    ring: int

    @property
    def prompt_slots(self) -> int:
        """Slots for the tokens of a prompt."""
        return self.cache.segments.shape[1] - self.ring


class Admission(NamedTuple):
    """New prompts, int32 [n], and where they were read.

    source, start  row and first column of the prompt's keys and values
    length         tokens of the prompt, at least 1
    last           column of its last token among the hidden states
    settings       what the requests ask for, [n, ...]
    """

    source: Array
    start: Array
    length: Array
    last: Array
    settings: Settings


class Emitted(NamedTuple):
    """Tokens not reported before: column i of a row is its i-th such token.

    tokens             int32 [B, chunk + 1]
    log_probabilities  fp32 [B, chunk + 1]
    top                the likeliest tokens, [B, chunk + 1, K]; None if no request asks
    """

    tokens: Array
    log_probabilities: Array
    top: Top | None


class Sizes(NamedTuple):
    """Sizes of rows: their number, slots for a prompt, slots of the ring, and stop tokens of a request."""

    rows: int
    prompt: int
    ring: int
    stops: int


@partial(jax.jit, static_argnames=("model", "sizes", "dtype", "adapters", "by_layer"))
def empty_rows(model: Model, sizes: Sizes, dtype: str, *, adapters: bool = False, by_layer: bool = False) -> Rows:
    """Free rows; with `adapters` they have an adapter each. Their cache is by layers if the base of `advance` is."""
    rows, prompt, ring, stops = sizes
    ints, floats, no = jnp.zeros(rows, jnp.int32), jnp.zeros(rows, jnp.float32), jnp.zeros(rows, bool)
    cache = init_cache(model.config, rows, prompt + ring, dtype)._replace(used=jnp.int32(prompt))
    cache = split_cache(cache) if by_layer else cache
    seeds, stop_tokens = jnp.zeros((rows, 2), jnp.uint32), jnp.full((rows, stops), NO_TOKEN, jnp.int32)
    strength = jnp.ones((rows, len(model.plan)), jnp.float32)
    adapter = ints - 1 if adapters else None
    settings = Settings(ints, seeds, ints, floats, ints, floats + 1, stop_tokens, strength, ints, adapter)
    margins, tops = jnp.full(rows, jnp.inf, jnp.float32), no_top((rows,), model.config.vocab_size)
    progress = Progress(ints, floats, ints, ints, no, ~no, margins, no, tops)
    return place(Rows(cache, settings, progress, ring))


@partial(jax.jit, donate_argnames="rows")
def insert(rows: Rows, row: Array, admission: Admission, progress: Progress) -> Rows:
    """Let prompts take over rows; `fill` puts their keys and values into the cache.

    Args:
        rows: donated.
        row: int32 [n], the row that each prompt takes over; an index past the last row drops it (padding).
        admission: the prompts.
        progress: with their first tokens, [n].
    """
    slots = jnp.arange(rows.prompt_slots, dtype=jnp.int32)[None]
    real = slots < admission.length[:, None]
    put = lambda field, new: field.at[row].set(new.astype(field.dtype), mode="drop")
    with_ring = lambda field: jnp.pad(field.astype(jnp.int32), ((0, 0), (0, rows.ring)))
    cache = rows.cache._replace(
        segments=put(rows.cache.segments, with_ring(real)),
        positions=put(rows.cache.positions, with_ring(jnp.broadcast_to(slots, real.shape))),
    )
    settings, progress = jax.tree.map(put, (rows.settings, rows.progress), (admission.settings, progress))
    return place(Rows(cache, settings, progress, rows.ring))


def fill(rows: Rows, prompts: KeysValues, row: Array) -> Rows:
    """The rows with the keys and values [L, n, K, W, H] of the prompts that took them over. `rows` are donated.

    Args:
        rows: from `insert`.
        prompts: from `prefill.prompts_of`.
        row: int32 [n], as in `insert`.
    """
    k, v = put_rows(KeysValues(rows.cache.k, rows.cache.v), prompts, row)
    return replace(rows, cache=rows.cache._replace(k=k, v=v))


@partial(jax.jit, static_argnames=("chunk", "drawing", "scaled"), donate_argnames="rows")
def advance(
    network: Network,
    rows: Rows,
    reported: Array,
    enough: Array,
    *,
    chunk: int,
    drawing: Drawing,
    scaled: bool = False,
) -> tuple[Rows, Emitted]:
    """Decode until `enough` rows are done, for at most `chunk` steps.

    Args:
        network: the model and its weights.
        rows: donated.
        reported: int32 [B], how many tokens of each row have been reported; at most one fewer than were drawn.
        enough: int32 [].
        chunk: maximum number of steps (static).
        drawing: what any active row may ask for (static).
        scaled: whether any active row has a strength other than 1 (static).

    Returns:
        The rows, and the tokens that were not reported yet.
    """
    first, settings = rows.prompt_slots, rows.settings
    slots = steered(network, settings.strength if scaled else None, settings.adapter)
    column = lambda field: field[:, None]
    columns = jnp.arange(chunk + 1, dtype=jnp.int32)[None]

    def unfinished(carry: tuple[Array, Cache, Progress, Emitted]) -> Array:
        step, _, progress, _ = carry
        return (step < chunk) & (jnp.sum(progress.done) < enough)

    def decode(carry: tuple[Array, Cache, Progress, Emitted]) -> tuple[Array, Cache, Progress, Emitted]:
        step, cache, progress, emitted = carry
        active = ~progress.done
        batch = _last_drawn(rows, progress)
        output = forward(network.model, network.base, network.steering, batch, cache=cache, **slots)
        assert output.cache is not None
        cache = output.cache._replace(used=first + (output.cache.used - first) % rows.ring)
        asked = settings._replace(
            temperature=jnp.where(active, settings.temperature, 0), top=jnp.where(active, settings.top, 0)
        )
        draw = draw_tokens(network, output.hidden[:, 0], asked, progress.drawn, drawing)
        kept, after = proceeded(progress, settings, draw)
        here = column(kept) & (columns == column(progress.drawn - reported))
        put = lambda new, old: jnp.where(here.reshape(here.shape + (1,) * (old.ndim - 2)), new[:, None], old)
        emitted = jax.tree.map(put, Emitted(draw.token, draw.log_probability, draw.top), emitted)
        return step + 1, cache, after, emitted

    progress = rows.progress
    unreported = Emitted(progress.token, progress.log_probability, progress.top if drawing.top else None)
    then_zeros = lambda field: jnp.zeros((len(field), chunk + 1, *field.shape[1:]), field.dtype).at[:, 0].set(field)
    emitted = jax.tree.map(then_zeros, unreported)
    start = (jnp.int32(0), rows.cache, progress, emitted)
    _, cache, progress, emitted = jax.lax.while_loop(unfinished, decode, start)
    return place(Rows(cache, settings, progress, rows.ring)), replicate(emitted)


def proceeded(progress: Progress, settings: Settings, draw: Draw) -> tuple[Array, Progress]:
    """Which rows have one more token after a draw, bool [B], and how far all are then."""
    active = ~progress.done
    failed = active & ~jnp.isfinite(draw.log_probability)
    stopped = active & ~failed & is_stop(draw.token, settings)
    kept = active & ~stopped & ~failed
    drawn = progress.drawn + kept.astype(jnp.int32)
    return kept, Progress(
        jnp.where(kept, draw.token, 0),
        draw.log_probability,
        progress.position + active.astype(jnp.int32),
        drawn,
        progress.stopped | stopped,
        progress.done | stopped | failed | (drawn >= settings.limit),
        jnp.where(active, jnp.minimum(progress.margin, draw.margin), progress.margin),
        progress.failed | failed,
        progress.top,
    )


def steered(network: Network, strength: Array | None, adapters: Array | None) -> dict[str, Any]:
    """Arguments of `forward`: the strength of each slot, from an array [..., number of slots], and the adapters."""
    slots = {} if strength is None else {slot.name: strength[..., i] for i, slot in enumerate(network.model.plan)}
    return {"strength": slots, "adapters": adapters}


def _last_drawn(rows: Rows, progress: Progress) -> Batch:
    """The last token drawn in each row as a batch [B, 1]; rows that are done are padding."""
    column = lambda field: field[:, None]
    completion = jnp.ones((len(progress.done), 1), bool)
    return Batch(
        column(progress.token),
        column((~progress.done).astype(jnp.int32)),
        column(progress.position),
        column(rows.settings.prompt_length),
        completion,
        jnp.zeros_like(completion, jnp.float32),
    )


Tree = TypeVar("Tree")


def replicate(tree: Tree) -> Tree:
    """On a mesh: copied to every device, for the host to read."""
    return jax.tree.map(lambda field: constrain(field, *(None,) * field.ndim), tree)


def place(rows: Rows) -> Rows:
    """On a mesh: keys and values split by rows and heads; what the host reads copied to every device."""
    stack = lambda x: constrain(x, *(None,) * (x.ndim - 4), "rows", "heads", None, None)
    k, v = jax.tree.map(stack, (rows.cache.k, rows.cache.v))
    cache = Cache(k, v, *replicate(rows.cache[2:]))
    return Rows(cache, replicate(rows.settings), replicate(rows.progress), rows.ring)
