"""Continuous batching: many prompts decoded in few rows, each finished row taken over by a prompt that waits.

All shapes are static. A row's cache has a slot for each token of a prompt, and behind them a ring: every step writes
one slot of it, the same in all rows, whenever a row began. Which slots a row reads follows from their segments, so a
new prompt takes a row over by overwriting its prompt's slots and clearing the segments of its ring.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.batches import Tokens, bucket_length, pack, stack_rows
from jaxsteer.inference.generate import Sampling, sample
from jaxsteer.models.config import ModelConfig, check_length
from jaxsteer.models.transformer import Model, forward, init_cache, logits_of, output_embedding
from jaxsteer.sharding import constrain, row_shards
from jaxsteer.types import Array, Batch, Cache, PyTree, Steering

PREFILL_SHARE = 16
"""A prefill has a row for every so many rows that decode, each of at least PREFILL_LENGTH tokens."""
PREFILL_LENGTH = 64
"""Short prompts share a row of the prefill: fewer shapes to compile, larger products."""
STEPS = 32
"""The most steps between two looks at what is finished."""
FEWEST = 8
"""Rows are halved while no prompt waits and half of them are free, but not below so many: each number is compiled."""


GREEDY = Sampling()


class Answer(NamedTuple):
    """What a prompt was continued with.

    tokens   int32 [n], the stop token left out
    stopped  False where the answer used all its tokens
    margin   the smallest difference of the two largest logits at any of its tokens, the stop token included: below
             rounding errors (1e-4 in fp32) another batch may well choose the other token
    """

    tokens: np.ndarray
    stopped: bool
    margin: float


class Rows(NamedTuple):
    """What is being decoded.

    cache                       slots for T prompt tokens, then a ring; `used` is the next slot to write
    token, position [B]         the last token drawn, not yet read by the model, and where it stands
    prompt_length, number [B]   of the prompt; its number tells its random draws from another's
    out [B, M], drawn [B]       tokens drawn, and how many
    stopped, done [B] bool      whether a stop token was drawn; whether the row is free
    margin [B]                  see `Answer`
    """

    cache: Cache
    token: Array
    position: Array
    prompt_length: Array
    number: Array
    out: Array
    drawn: Array
    stopped: Array
    done: Array
    margin: Array

    @property
    def ring(self) -> int:
        """Slots of the ring: the last token of an answer is never read."""
        return max(1, self.out.shape[1] - 1)


class Places(NamedTuple):
    """For each new prompt, int32 [n]: the row that it takes over (too large = none), where in the prefill it stands
    (row, first column, length), its prompt length, and its number.
    """

    row: Array
    source: Array
    start: Array
    length: Array
    prompt_length: Array
    number: Array


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def empty_rows(config: ModelConfig, rows: int, prompt: int, new: int, dtype: str) -> Rows:
    """Free rows, for prompts of at most `prompt` tokens and `new` tokens after them."""
    ints, no, yes = jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool), jnp.ones(rows, bool)
    cache = init_cache(config, rows, prompt + max(1, new - 1), dtype)._replace(used=jnp.int32(prompt))
    out = jnp.zeros((rows, new), jnp.int32)
    return _spread(Rows(cache, ints, ints, ints, ints, out, ints, no, yes, jnp.full(rows, jnp.inf)))


@partial(jax.jit, static_argnames="model")
def prefill(model: Model, base: PyTree, steering: Steering, prompts: Batch) -> tuple[Array, Cache]:
    """Hidden states [P, W, D] and cache of prompts, several of which may share a row."""
    output = forward(model, base, steering, prompts, keep_cache=True)
    assert output.cache is not None
    return output.hidden, output.cache


@partial(jax.jit, static_argnames=("model", "sampling"), donate_argnames="rows")
def insert(
    model: Model,
    base: PyTree,
    rows: Rows,
    hidden: Array,
    filled: Cache,
    places: Places,
    stops: Array,
    key: Array,
    *,
    sampling: Sampling,
) -> Rows:
    """Let prompts take over rows, and draw their first tokens.

    Args:
        rows: donated.
        hidden, filled: of `prefill`.
        places: what goes where.
        stops: tokens that end a row, int32 [n].
    """
    cache, ring, M = rows.cache, rows.ring, rows.out.shape[1]
    T = cache.segments.shape[1] - ring
    column = jnp.arange(T, dtype=jnp.int32)[None]
    real = column < places.length[:, None]
    from_column = jnp.minimum(places.start[:, None] + column, filled.segments.shape[1] - 1)
    put = lambda field, new: field.at[places.row].set(new.astype(field.dtype), mode="drop")
    window = lambda stack: jax.vmap(lambda source, at: stack[:, source][:, :, at], out_axes=1)(
        places.source, from_column
    )
    move = lambda stack, new: stack.at[:, places.row, :, :T].set(window(new), mode="drop")
    cache = cache._replace(
        k=move(cache.k, filled.k),
        v=move(cache.v, filled.v),
        segments=put(cache.segments, jnp.pad(real.astype(jnp.int32), ((0, 0), (0, ring)))),
        positions=put(cache.positions, jnp.pad(jnp.broadcast_to(column, real.shape), ((0, 0), (0, ring)))),
    )
    last = hidden[places.source, places.start + places.length - 1]
    count = jnp.zeros_like(places.row)
    token, margin = _draw(model, base, last, places.number, count, key, sampling)
    stopped = jnp.isin(token, stops)
    token = jnp.where(stopped, 0, token)
    count = 1 - stopped.astype(jnp.int32)
    first = jnp.pad(token[:, None], ((0, 0), (0, M - 1)))
    new = (token, places.length, places.prompt_length, places.number, first, count, stopped, stopped | (M == 1), margin)
    return _spread(Rows(cache, *map(put, rows[1:], new)))


@partial(jax.jit, static_argnames=("model", "sampling"), donate_argnames="rows")
def advance(
    model: Model,
    base: PyTree,
    steering: Steering,
    rows: Rows,
    enough: Array,
    stops: Array,
    key: Array,
    *,
    sampling: Sampling,
) -> Rows:
    """Decode until `enough` (int32 []) rows are done, at most STEPS steps. `rows` are donated."""
    M, ring = rows.out.shape[1], rows.ring
    first = rows.cache.segments.shape[1] - ring

    def going(carry: tuple[Array, Rows]) -> Array:
        step, rows = carry
        return (step < STEPS) & (jnp.sum(rows.done) < enough)

    def step(carry: tuple[Array, Rows]) -> tuple[Array, Rows]:
        step, rows = carry
        active = ~rows.done
        column = lambda field: field[:, None]
        batch = Batch(
            column(rows.token),
            column(active.astype(jnp.int32)),
            column(rows.position),
            column(rows.prompt_length),
            jnp.ones((len(active), 1), bool),  # generated tokens are completion
            jnp.zeros((len(active), 1), jnp.float32),
        )
        output = forward(model, base, steering, batch, cache=rows.cache)
        assert output.cache is not None
        cache = output.cache._replace(used=first + (output.cache.used - first) % ring)
        token, margin = _draw(model, base, output.hidden[:, 0], rows.number, rows.drawn, key, sampling)
        stopped = active & jnp.isin(token, stops)
        kept = active & ~stopped
        here = column(kept) & (jnp.arange(M, dtype=jnp.int32)[None] == column(rows.drawn))
        count = rows.drawn + kept.astype(jnp.int32)
        return step + 1, Rows(
            cache,
            jnp.where(kept, token, 0),
            rows.position + active.astype(jnp.int32),
            rows.prompt_length,
            rows.number,
            jnp.where(here, column(token), rows.out),
            count,
            rows.stopped | stopped,
            rows.done | stopped | (count >= M),
            jnp.where(active, jnp.minimum(rows.margin, margin), rows.margin),
        )

    return _spread(jax.lax.while_loop(going, step, (jnp.int32(0), rows))[1])


@partial(jax.jit, donate_argnames="rows")
def free_rows(rows: Rows, mask: Array) -> Rows:
    """The same with more rows done, bool [B]. `rows` are donated."""
    return _spread(rows._replace(done=rows.done | mask, stopped=rows.stopped | mask))


@partial(jax.jit, static_argnames="prompt")
def shrink(rows: Rows, prompt: int) -> Rows:
    """The same rows with slots for prompts of at most `prompt` tokens: each step reads all slots, used or not."""
    cache = rows.cache
    dropped = cache.segments.shape[1] - rows.ring - prompt
    cut = lambda field, axis: jnp.concatenate(
        [
            jax.lax.slice_in_dim(field, 0, prompt, axis=axis),
            jax.lax.slice_in_dim(field, prompt + dropped, None, axis=axis),
        ],
        axis,
    )
    cache = Cache(
        cut(cache.k, 3), cut(cache.v, 3), cut(cache.segments, 1), cut(cache.positions, 1), cache.used - dropped
    )
    return _spread(rows._replace(cache=cache))


@jax.jit
def keep_rows(rows: Rows, kept: Array) -> Rows:
    """Some of the rows, int32 [n]: a free row costs as much as a busy one."""
    some = lambda field: field[kept]
    cache = rows.cache
    fewer = Cache(cache.k[:, kept], cache.v[:, kept], some(cache.segments), some(cache.positions), cache.used)
    return _spread(Rows(fewer, *map(some, rows[1:])))


def generate_all(
    model: Model,
    base: PyTree,
    steering: Steering,
    prompts: Sequence[Tokens],
    key: Array | None = None,
    *,
    max_new_tokens: int,
    stop_tokens: tuple[int, ...],
    rows: int = 64,
    sampling: Sampling = GREEDY,
    place: Callable[[Batch], Batch] = lambda batch: jax.tree.map(jnp.asarray, batch),
    ended: Callable[[int, np.ndarray], bool] = lambda index, tokens: False,
) -> Iterator[tuple[int, Answer]]:
    """Continue every prompt, as `generate` does, with rows that are never left empty while a prompt waits.

    Greedy answers do not depend on the rows or on what else is asked, but for rounding where two tokens are as likely
    (`Answer.margin`); drawn ones neither: each prompt has a key of its own.

    Args:
        prompts: each with at least one token.
        key: needed unless greedy.
        max_new_tokens, stop_tokens, sampling: as in `generate`.
        rows: decoded at a time.
        place: puts a batch on the devices that the weights lie on.
        ended: asked now and then whether the tokens of a prompt's unfinished answer are enough; it counts as stopped.

    Yields:
        (index of the prompt, its answer), as they are finished: the longest prompts begin.

    Raises:
        ValueError: fewer than 1 new token or row, an empty prompt, sampling without a key, or more tokens than the
            model has learned positions.
    """
    if max_new_tokens < 1 or rows < 1:
        raise ValueError(f"max_new_tokens and rows must be at least 1, got {max_new_tokens} and {rows}")
    if key is None and sampling.temperature > 0:
        raise ValueError("sampling with a temperature above 0 needs a key")
    if empty := [prompt.source for prompt in prompts if not len(prompt.ids)]:
        raise ValueError(f"{empty[0]}: an empty prompt; there is nothing to continue")
    for prompt in prompts:
        check_length(model.config, len(prompt.ids) + max_new_tokens, prompt.source)
    if not prompts:
        return
    key = jax.random.key(0) if key is None else key
    stops = np.array(stop_tokens, np.int32)
    length = lambda index: len(prompts[index].ids)
    waiting = deque(sorted(range(len(prompts)), key=lambda index: -length(index)))
    rows = min(rows, len(prompts))
    room = bucket_length(length(waiting[0]))
    held: list[int | None] = [None] * rows
    state = empty_rows(model.config, rows, room, max_new_tokens, jnp.dtype(base["embed"]["embedding"].dtype).name)
    while waiting or any(index is not None for index in held):
        free = [row for row, index in enumerate(held) if index is None]
        while waiting and len(free) >= len(_next(waiting, prompts, rows, -(-rows // 4))[0]):
            new, packed, width = _next(waiting, prompts, rows, len(free))
            batch = stack_rows([[prompts[new[i]] for i in members] for members in packed], width)
            hidden, filled = prefill(model, base, steering, place(batch))
            taken, free = free[: len(new)], free[len(new) :]
            places = _places([prompts[index] for index in new], new, packed, taken, rows)
            state = insert(model, base, state, hidden, filled, places, stops, key, sampling=sampling)
            for row, number in zip(taken, new, strict=True):
                held[row] = number
            for _ in new:
                waiting.popleft()
        needed = bucket_length(max([*(length(i) for i in held if i is not None), *map(length, islice(waiting, 1))]))
        if needed < room:
            state, room = shrink(state, needed), needed
        half = _half(rows)
        if not waiting and half and sum(index is not None for index in held) <= half:
            kept = sorted(range(rows), key=lambda row: held[row] is None)[:half]
            state, held, rows = keep_rows(state, np.array(kept, np.int32)), [held[row] for row in kept], half
            continue
        enough = len(_next(waiting, prompts, rows, -(-rows // 4))[0]) if waiting else rows - half
        state = advance(model, base, steering, state, np.int32(enough), stops, key, sampling=sampling)
        done, out, count, stopped, margin = (
            np.asarray(field) for field in (state.done, state.out, state.drawn, state.stopped, state.margin)
        )
        enough_said = np.array(
            [i is not None and not done[r] and ended(i, out[r, : count[r]]) for r, i in enumerate(held)], bool
        )
        if enough_said.any():
            state = free_rows(state, enough_said)
            done, stopped = done | enough_said, stopped | enough_said
        for row, index in enumerate(held):
            if index is not None and done[row]:
                held[row] = None
                yield index, Answer(out[row, : count[row]].copy(), bool(stopped[row]), float(margin[row]))


def _half(rows: int) -> int:
    """Half as many rows, or 0 where that is too few or not shared evenly by the devices."""
    half = rows // 2
    return half if half >= FEWEST and half % row_shards() == 0 else 0


def _next(
    waiting: Sequence[int], prompts: Sequence[Tokens], rows: int, most: int
) -> tuple[list[int], list[list[int]], int]:
    """The next prompts to prefill, at most so many: their indices, which of them share a row, and its length."""
    width = bucket_length(len(prompts[waiting[0]].ids), PREFILL_LENGTH)
    shards = row_shards()
    room = -(-max(1, rows // PREFILL_SHARE) // shards) * shards
    chosen = list(islice(waiting, most))
    packed = pack([len(prompts[index].ids) for index in chosen], width)
    if len(packed) > room:
        chosen = chosen[: packed[room][0]]
        packed = pack([len(prompts[index].ids) for index in chosen], width)
    return chosen, [*packed, *([] for _ in range(room - len(packed)))], width


def _places(new: Sequence[Tokens], numbers: list[int], packed: list[list[int]], taken: list[int], rows: int) -> Places:
    """Where the new prompts stand in the prefill and which rows they take, padded to a power of two of them."""
    n = 1 << (len(new) - 1).bit_length()
    fields = np.zeros((6, n), np.int32)
    fields[0] = rows  # no such row: dropped
    fields[3] = 1
    for source, members in enumerate(packed):
        start = 0
        for i in members:
            length = len(new[i].ids)
            fields[:, i] = taken[i], source, start, length, min(new[i].prompt_length, length), numbers[i]
            start += length
    return Places(*map(jnp.asarray, fields))


def _draw(
    model: Model, base: PyTree, hidden: Array, number: Array, count: Array, key: Array, sampling: Sampling
) -> tuple[Array, Array]:
    """Draw the next token of each row, hidden [B, D] -> int32 [B], and how far the likeliest is ahead, fp32 [B]."""
    logits = logits_of(hidden, output_embedding(base), model.config.final_softcap)
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    others = jnp.where(jnp.arange(logits.shape[-1], dtype=jnp.int32)[None] == best[:, None], -jnp.inf, logits)
    margin = (jnp.max(logits, axis=-1) - jnp.max(others, axis=-1)).astype(jnp.float32)
    if sampling.temperature == 0:
        return best, margin
    own = jax.vmap(lambda n, c: jax.random.fold_in(jax.random.fold_in(key, n), c))(number, count)
    return jax.vmap(lambda row, k: sample(row[None], sampling, k)[0])(logits, own), margin


def _spread(rows: Rows) -> Rows:
    """On a mesh: the cache by rows and heads; what the host reads copied to every device."""
    stack = lambda x: constrain(x, None, "rows", "heads", None, None)
    cache = rows.cache._replace(k=stack(rows.cache.k), v=stack(rows.cache.v))
    return Rows(cache, *(constrain(field, *(None,) * field.ndim) for field in rows[1:]))
