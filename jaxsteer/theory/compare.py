"""How far one network's predictions are from another's: KL divergence, agreement, and right answers, token by token."""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.models.transformer import Model, Network, forward, logits_of, output_embedding
from jaxsteer.objective import next_tokens, predicts_completion, scan_counted
from jaxsteer.theory.oracle import check_comparable
from jaxsteer.types import Array, Batch, PyTree, Steering

Where = Literal["answers", "all"]
"""Which predictions count: those of the supervised tokens, or what is predicted after every token of an example."""
CHUNK = 128
"""Predictions whose logits, over the whole vocabulary, exist at one time."""


class Comparison(NamedTuple):
    """Of each prediction, fp32 [B, T]; 0 where none counts.

    kl       KL(tuned ‖ other), nats
    same     1 where the two have the same most likely token
    right    1 where the other's most likely token is the next one
    counted  1 where a prediction counts
    """

    kl: Array
    same: Array
    right: Array
    counted: Array


class Totals(NamedTuple):
    """Sums over predictions and examples; those of several batches add up (`jax.tree.map`). Scalars, fp32.

    kl, same, right  of `Comparison`, summed
    predictions      that count
    solved           examples of which every prediction that counts is right
    examples         with any prediction that counts
    """

    kl: Array
    same: Array
    right: Array
    predictions: Array
    solved: Array
    examples: Array


class Means(NamedTuple):
    """kl in nats a prediction; agreement with the tuned model and token accuracy, shares of the predictions; accuracy,
    share of the examples whose answer is right throughout.
    """

    kl: float
    agreement: float
    token_accuracy: float
    accuracy: float


def counted_predictions(batch: Batch, where: Where) -> Array:
    """Which positions' predictions count, bool [B, T].

    Raises:
        ValueError: an unknown `where`.
    """
    if where == "answers":
        return predicts_completion(batch)
    if where != "all":
        raise ValueError(f"which predictions? answers or all, got {where!r}")
    return batch.segments > 0


def compare_networks(tuned: Network, other: Network, batch: Batch, where: Where = "answers") -> Comparison:
    """Two networks' predictions of one batch. Differentiable in both, through kl.

    Raises:
        ValueError: models of different shapes.
    """
    check_comparable(tuned, other)
    return compare_hidden(tuned(batch).hidden, tuned, other(batch).hidden, other, batch, where)


def compare_hidden(
    told: Array, tuned: Network, hidden: Array, other: Network, batch: Batch, where: Where = "answers"
) -> Comparison:
    """The same, from the hidden states [B, T, D] that the two networks have come to."""
    counted = counted_predictions(batch, where)
    following = next_tokens(batch._replace(weights=jnp.ones_like(batch.weights)))
    targets = jnp.where(following.weights > 0, following.tokens, -1)  # nothing is right after an example's end
    heads = [_head(network) for network in (tuned, other)]
    B, T, _ = hidden.shape
    flat = lambda field: field.reshape(B * T, *field.shape[2:])
    fields = flat(told), flat(hidden), flat(targets)

    @jax.checkpoint  # or the backward pass would keep the logits of all chunks
    def differ(told: Array, hidden: Array, target: Array, counts: Array) -> tuple[Array, Array, Array]:
        mask = counts[:, None]
        a, b = (logits_of(jnp.where(mask, h, 0), *head) for h, head in zip((told, hidden), heads, strict=True))
        log_p, log_q = jax.nn.log_softmax(a), jax.nn.log_softmax(b)
        kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
        top = jnp.argmax(b, axis=-1)
        values = (kl, jnp.argmax(a, axis=-1) == top, top == target)
        return tuple(jnp.where(counts, value.astype(jnp.float32), 0) for value in values)  # type: ignore[return-value]

    def visit(sums: tuple[Array, Array, Array], index: Array, mask: Array) -> tuple[Array, Array, Array]:
        index, mask = index[0], mask[0]
        values = differ(*(field[index] for field in fields), mask)
        # Added, not set: an index that is not counted may repeat one that is, and its values are 0.
        return tuple(total.at[index].add(value) for total, value in zip(sums, values, strict=True))  # type: ignore[return-value]

    zeros = (jnp.zeros(B * T, jnp.float32),) * 3
    kl, same, right = (values.reshape(B, T) for values in scan_counted(visit, zeros, counted.reshape(1, -1), CHUNK))
    return Comparison(kl, same, right, counted.astype(jnp.float32))


def _head(network: Network) -> tuple[PyTree, float | None]:
    return output_embedding(network.base), network.model.config.final_softcap


def by_example(values: Array, batch: Batch) -> Array:
    """Sums of values [..., B, T] over the examples, [..., B, T + 1], by their number in the row (0 = padding)."""
    B, T = batch.segments.shape
    rows = jnp.arange(B)[:, None]
    zeros = jnp.zeros((*values.shape[:-1], T + 1), values.dtype)
    return zeros.at[..., rows, batch.segments].add(values)


def totals(comparison: Comparison, batch: Batch) -> Totals:
    """Sum a comparison over its predictions and examples."""
    wrong = by_example(comparison.counted - comparison.right, batch)
    asked = by_example(comparison.counted, batch) > 0
    count = lambda mask: jnp.sum(mask.astype(jnp.float32))
    kl, same, right, counted = (jnp.sum(field) for field in comparison)
    return Totals(kl, same, right, counted, count(asked & (wrong == 0)), count(asked))


def means(sums: Totals) -> Means:
    """Averages of the sums; NaN where nothing counted."""
    kl, same, right, predictions, solved, examples = (float(np.asarray(value)) for value in sums)
    over = lambda value, n: value / n if n else float("nan")
    return Means(over(kl, predictions), over(same, predictions), over(right, predictions), over(solved, examples))


@partial(jax.jit, static_argnames="model")
def kl_from_base(model: Model, base: PyTree, steering: Steering, batch: Batch) -> Array:
    """Σ_v p(v) log(p(v) / q(v)), p the plain model's next-token distribution, q the steered one's.

    Args:
        batch: [B, T]; only positions that predict a token of a completion count.

    Returns:
        For each row the mean over its positions, nats, fp32 [B]; 0 for a row without any.
    """
    head, softcap = output_embedding(base), model.config.final_softcap
    plain = forward(Model(model.config, attention=model.attention), base, {}, batch).hidden
    steered = forward(model, base, steering, batch).hidden

    def column(pair: tuple[Array, Array]) -> Array:  # one position's logits at a time
        p, q = (jax.nn.log_softmax(logits_of(hidden, head, softcap), axis=-1) for hidden in pair)
        return jnp.sum(jnp.exp(p) * (p - q), axis=-1)

    kl = jax.lax.map(column, (plain.swapaxes(0, 1), steered.swapaxes(0, 1))).T
    counted = predicts_completion(batch).astype(np.float32)
    return jnp.sum(kl.astype(np.float32) * counted, axis=1) / jnp.maximum(jnp.sum(counted, axis=1), 1.0)
