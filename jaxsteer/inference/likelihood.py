"""How likely a model finds given continuations of a prompt: the prompt is read once, each continuation on its cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.batches import Tokens, bucket_length, stack_rows
from jaxsteer.inference.generate import more_slots
from jaxsteer.models.config import check_length
from jaxsteer.models.transformer import Model, forward, logits_of, output_embedding
from jaxsteer.sharding import constrain
from jaxsteer.types import Array, Batch, PyTree, Steering

SHORTEST = 4
"""Continuations are padded to lengths of `bucket_length` from here."""


class Likelihood(NamedTuple):
    """Of a continuation: Σ log p of its tokens, nats; whether each of them is the most likely one; their number."""

    log_probability: float
    greedy: bool
    tokens: int


@partial(jax.jit, static_argnames="model")
def continuation_likelihoods(
    model: Model, base: PyTree, steering: Steering, prompts: Batch, continuations: Batch
) -> tuple[Array, Array]:
    """Score C continuations of each row's prompt; what is continued counts as completion for token selection.

    Args:
        prompts: [B, T], one a row, from the first column.
        continuations: [C, B, U], one a row, from the first column; rows without tokens score 0.

    Returns:
        Σ log p, fp32 [C, B], and whether every token is the most likely one, bool [C, B].
    """
    U = continuations.tokens.shape[-1]
    output = forward(model, base, steering, prompts, keep_cache=True)
    assert output.cache is not None
    cache, head = more_slots(output.cache, U), output_embedding(base)
    ends = jnp.maximum(jnp.sum(prompts.segments > 0, axis=1, dtype=jnp.int32) - 1, 0)
    last = jnp.take_along_axis(output.hidden, ends[:, None, None], axis=1)

    def column(seen: tuple[Array, Array]) -> tuple[Array, Array]:  # hidden [B, D], the token that follows [B]
        hidden, token = seen
        logits = logits_of(hidden, head, model.config.final_softcap)
        at_token = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
        return at_token - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == token

    def score(batch: Batch) -> tuple[Array, Array]:
        read = forward(model, base, steering, batch, cache=cache).hidden
        hidden = jnp.concatenate([last, read[:, :-1]], axis=1)
        logp, best = jax.lax.map(column, (hidden.swapaxes(0, 1), batch.tokens.T))  # one column's logits at a time
        real = batch.segments.T > 0
        return jnp.sum(jnp.where(real, logp, 0.0), axis=0), jnp.all(best | ~real, axis=0)

    logp, greedy = jax.lax.map(score, continuations)
    return constrain(logp.astype(jnp.float32), None, None), constrain(greedy, None, None)


def score_continuations(
    model: Model,
    base: PyTree,
    steering: Steering,
    prompts: Sequence[Tokens],
    continuations: Sequence[Sequence[np.ndarray]],
    *,
    batch_size: int = 32,
    place: Callable[[Batch], Batch] = lambda batch: jax.tree.map(jnp.asarray, batch),
) -> Iterator[tuple[int, list[Likelihood]]]:
    """Score the continuations of every prompt.

    Args:
        prompts: each with at least one token.
        continuations: for each prompt the token ids, int32 [n], n at least 1, of one or more continuations.
        batch_size: prompts at a time.
        place: puts a batch [B, T] or [C, B, T] on the devices that the weights lie on.

    Yields:
        (index of the prompt, a score for each of its continuations), those with the most and the longest first.

    Raises:
        ValueError: an empty prompt or continuation, fewer than one row, or more tokens than the model has learned
            positions.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    for prompt, own in zip(prompts, continuations, strict=True):
        if not len(prompt.ids) or not own or not all(map(len, own)):
            raise ValueError(f"{prompt.source}: a prompt, and each of its continuations, needs at least one token")
        check_length(model.config, len(prompt.ids) + max(map(len, own)), prompt.source)
    size = lambda i: (
        len(continuations[i]),
        bucket_length(len(prompts[i].ids)),
        bucket_length(max(map(len, continuations[i])), SHORTEST),
    )
    order = sorted(range(len(prompts)), key=lambda i: (*(-n for n in size(i)), i))
    rows = min(batch_size, max(1, len(prompts)))
    start = 0
    while start < len(order):
        count, T, _ = size(order[start])
        chosen = [i for i in order[start : start + rows] if len(continuations[i]) == count]
        U = max(size(i)[2] for i in chosen)
        empty: list[list[Any]] = [[] for _ in range(rows - len(chosen))]
        asked = stack_rows([*([prompts[i]] for i in chosen), *empty], T)
        answers = _stack([prompts[i] for i in chosen], [continuations[i] for i in chosen], rows, U)
        found = continuation_likelihoods(model, base, steering, place(asked), place(answers))
        logp, greedy = (np.asarray(x) for x in found)
        for row, i in enumerate(chosen):
            yield (
                i,
                [
                    Likelihood(float(logp[c, row]), bool(greedy[c, row]), len(own))
                    for c, own in enumerate(continuations[i])
                ],
            )
        start += len(chosen)


def _stack(prompts: Sequence[Tokens], continuations: Sequence[Sequence[np.ndarray]], rows: int, length: int) -> Batch:
    """Continuations [C, B, U], numpy; positions go on where the prompts end."""
    shape = (len(continuations[0]), rows, length)
    tokens, segments, positions, prompt_lengths = (np.zeros(shape, np.int32) for _ in range(4))
    for row, (prompt, own) in enumerate(zip(prompts, continuations, strict=True)):
        for c, ids in enumerate(own):
            span = (c, row, slice(len(ids)))
            tokens[span], segments[span] = ids, 1
            positions[span] = len(prompt.ids) + np.arange(len(ids))
            prompt_lengths[span] = min(prompt.prompt_length, len(prompt.ids))
    real = segments > 0
    fields: Any = (tokens, segments, positions, prompt_lengths, real, real.astype(np.float32))  # numpy on the host
    return Batch(*fields)
