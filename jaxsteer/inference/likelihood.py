"""Log-likelihoods of given continuations: each prompt is read once, and each of its continuations on its cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxsteer.adapters import BASE
from jaxsteer.batches import Tokens, bucket_length, stack_rows
from jaxsteer.inference.generate import more_slots, to_device
from jaxsteer.inference.scheduling import nonfinite_logits
from jaxsteer.models.config import check_length
from jaxsteer.models.transformer import Model, forward, logits_of, output_embedding
from jaxsteer.sharding import constrain
from jaxsteer.types import Array, Batch, PyTree, Steering

SHORTEST = 4
"""Continuations are padded to a `bucket_length` of at least this."""


class Likelihood(NamedTuple):
    """Score of a continuation.

    log_probability  Σ log p of its tokens, in nats
    greedy           whether each token is the most likely one
    tokens           number of tokens
    """

    log_probability: float
    greedy: bool
    tokens: int


@partial(jax.jit, static_argnames="model")
def continuation_likelihoods(
    model: Model,
    base: PyTree,
    steering: Steering,
    prompts: Batch,
    continuations: Batch,
    strength: Mapping[str, ArrayLike] | None = None,
    adapters: Array | None = None,
) -> tuple[Array, Array]:
    """Score C continuations of each row's prompt; the continuation counts as completion for token selection.

    Args:
        model, base, steering: as in `forward`.
        prompts: [B, T], one per row, starting in the first column.
        continuations: [C, B, U], one per row, starting in the first column; rows without tokens score 0.
        strength: of the slots, [] or one for each row [B], as in `forward`.
        adapters: with stacked steering, the index of each row's adapter, int [B], as in `forward`.

    Returns:
        Σ log p, fp32 [C, B], and whether every token is the most likely one, bool [C, B].
    """
    U = continuations.tokens.shape[-1]
    steered: Any = {"strength": strength, "adapters": adapters}
    output = forward(model, base, steering, prompts, keep_cache=True, **steered)
    assert output.cache is not None
    cache, head = more_slots(output.cache, U), output_embedding(base)
    ends = jnp.maximum(jnp.sum(prompts.segments > 0, axis=1, dtype=jnp.int32) - 1, 0)
    last = jnp.take_along_axis(output.hidden, ends[:, None, None], axis=1)

    def score_column(column: tuple[Array, Array]) -> tuple[Array, Array]:  # hidden [B, D], the next token [B]
        hidden, token = column
        logits = logits_of(hidden, head, model.config.final_softcap)
        at_token = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
        return at_token - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == token

    def score(batch: Batch) -> tuple[Array, Array]:
        # The last token is only a target: reading it would need a position more than the model may have.
        ends = jnp.pad(batch.segments[:, 1:] == 0, ((0, 0), (0, 1)), constant_values=True)
        inputs = batch._replace(
            segments=jnp.where(ends, 0, batch.segments), positions=jnp.where(ends, 0, batch.positions)
        )
        read = forward(model, base, steering, inputs, cache=cache, **steered).hidden
        hidden = jnp.concatenate([last, read[:, :-1]], axis=1)
        # One column at a time, for the memory of the logits.
        log_probabilities, best = jax.lax.map(score_column, (hidden.swapaxes(0, 1), batch.tokens.T))
        real = batch.segments.T > 0
        return jnp.sum(jnp.where(real, log_probabilities, 0.0), axis=0), jnp.all(best | ~real, axis=0)

    totals, greedy = jax.lax.map(score, continuations)
    return constrain(totals.astype(jnp.float32), None, None), constrain(greedy, None, None)


def score_continuations(
    model: Model,
    base: PyTree,
    steering: Steering,
    prompts: Sequence[Tokens],
    continuations: Sequence[Sequence[np.ndarray]],
    *,
    batch_size: int = 32,
    place: Callable[[Batch], Batch] = to_device,
    strength: Mapping[str, float] | None = None,
    adapters: Sequence[int] | None = None,
) -> Iterator[tuple[int, list[Likelihood]]]:
    """Score the continuations of every prompt.

    Args:
        model, base, steering: as in `forward`.
        prompts: each with at least one token.
        continuations: for each prompt, the token ids of one or more continuations, int32 [n] with n at least 1.
        batch_size: number of prompts scored at a time.
        place: puts a numpy batch [B, T] or [C, B, T] on the devices that hold the weights.
        strength: of the slots, as in `forward`; the same for all prompts.
        adapters: with stacked steering, the index of each prompt's adapter, as in `forward`.

    Yields:
        (index of the prompt, a score for each of its continuations), prompts with the most and the longest first.

    Raises:
        ValueError: an empty prompt or continuation, a batch size below 1, or more tokens than the model has learned
            positions for.
        FloatingPointError: the model's logits are not finite, so that no continuation is more likely than another.
    """
    _check(model, prompts, continuations, batch_size)
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
        start += len(chosen)
        U = max(size(i)[2] for i in chosen)
        padding: list[list[Tokens]] = [[] for _ in range(rows - len(chosen))]
        prompt_batch = stack_rows([*([prompts[i]] for i in chosen), *padding], T)
        batches = _stack([prompts[i] for i in chosen], [continuations[i] for i in chosen], rows, U)
        own: Any = (
            None if adapters is None else np.array([adapters[i] for i in chosen] + [BASE] * len(padding), np.int32)
        )
        scores = continuation_likelihoods(model, base, steering, place(prompt_batch), place(batches), strength, own)
        totals, greedy = (np.asarray(x) for x in scores)
        for row, i in enumerate(chosen):
            if not np.isfinite(totals[: len(continuations[i]), row]).all():
                raise nonfinite_logits(prompts[i], model.config.vocab_size)
            lengths = map(len, continuations[i])
            yield i, [Likelihood(float(totals[c, row]), bool(greedy[c, row]), n) for c, n in enumerate(lengths)]


def _check(
    model: Model, prompts: Sequence[Tokens], continuations: Sequence[Sequence[np.ndarray]], batch_size: int
) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    for prompt, texts in zip(prompts, continuations, strict=True):
        if not len(prompt.ids) or not texts or not all(map(len, texts)):
            raise ValueError(f"{prompt.source}: a prompt, and each of its continuations, needs at least one token")
        check_length(model.config, len(prompt.ids) + max(map(len, texts)) - 1, prompt.source)  # the last is not read


def _stack(prompts: Sequence[Tokens], continuations: Sequence[Sequence[np.ndarray]], rows: int, length: int) -> Batch:
    """Continuations [C, B, U], numpy; positions continue those of the prompts."""
    shape = (len(continuations[0]), rows, length)
    tokens, segments, positions, prompt_lengths = (np.zeros(shape, np.int32) for _ in range(4))
    for row, (prompt, texts) in enumerate(zip(prompts, continuations, strict=True)):
        for c, ids in enumerate(texts):
            span = (c, row, slice(len(ids)))
            tokens[span], segments[span] = ids, 1
            positions[span] = len(prompt.ids) + np.arange(len(ids))
            prompt_lengths[span] = min(prompt.prompt_length, len(prompt.ids))
    real = segments > 0
    fields: Any = (tokens, segments, positions, prompt_lengths, real, real.astype(np.float32))  # numpy on the host
    return Batch(*fields)
