"""How one network's predictions differ from another's: KL divergence, agreement and accuracy, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.models.transformer import Model, Network, logits_of, output_embedding
from jaxsteer.objectives.distillation import kl_between
from jaxsteer.objectives.tokens import by_segment, next_tokens, predicts_completion, scan_counted
from jaxsteer.theory.oracle import check_comparable
from jaxsteer.types import Array, Batch, PyTree, Steering

Where = Literal["answers", "all"]
"""Which predictions count: those of completion tokens, or those after every token that is not padding."""
CHUNK = 128
"""Number of positions whose logits over the vocabulary are in memory at one time."""


class Comparison(NamedTuple):
    """A network's predictions beside the tuned one's, position by position, fp32 [B, T]; 0 where none counts.

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
    """Sums over predictions and examples, fp32 scalars; add them over batches with `jax.tree.map`.

    kl, same, right  sums of the fields of `Comparison`
    predictions      number of predictions that count
    solved           number of examples of which every prediction that counts is right
    examples         number of examples with a prediction that counts
    """

    kl: Array
    same: Array
    right: Array
    predictions: Array
    solved: Array
    examples: Array


class Means(NamedTuple):
    """Averages of `Totals`.

    kl              KL(tuned ‖ other), nats per prediction
    agreement       share of the predictions whose most likely token is the tuned model's
    token_accuracy  share of the predictions whose most likely token is the next one
    accuracy        share of the examples of which every prediction is right
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
    """Compare two networks' predictions on a batch. `kl` is differentiable in both networks.

    Args:
        tuned: the reference.
        other: the network to compare with it.
        batch: [B, T], packed or padded.
        where: which predictions count; static.

    Raises:
        ValueError: models of different shapes, an unknown `where`.
    """
    check_comparable(tuned, other)
    return compare_hidden(tuned(batch).hidden, tuned, other(batch).hidden, other, batch, where)


def compare_hidden(
    tuned_hidden: Array, tuned: Network, hidden: Array, other: Network, batch: Batch, where: Where = "answers"
) -> Comparison:
    """`compare_networks` from the final hidden states [B, T, D] of the two networks."""
    counted = counted_predictions(batch, where)
    following = next_tokens(batch._replace(weights=jnp.ones_like(batch.weights)))
    targets = jnp.where(following.weights > 0, following.tokens, -1)  # nothing is right after an example's end
    heads = [_head(network) for network in (tuned, other)]
    B, T, _ = hidden.shape
    flat = lambda field: field.reshape(B * T, *field.shape[2:])
    fields = flat(tuned_hidden), flat(hidden), flat(targets)

    @jax.checkpoint  # or the backward pass would keep the logits of all chunks
    def differ(tuned_hidden: Array, hidden: Array, target: Array, counts: Array) -> tuple[Array, Array, Array]:
        mask = counts[:, None]
        a, b = (logits_of(jnp.where(mask, h, 0), *head) for h, head in zip((tuned_hidden, hidden), heads, strict=True))
        top = jnp.argmax(b, axis=-1)
        values = (kl_divergence(a, b), jnp.argmax(a, axis=-1) == top, top == target)
        return tuple(jnp.where(counts, value.astype(jnp.float32), 0) for value in values)  # type: ignore[return-value]

    def visit(sums: tuple[Array, Array, Array], index: Array, mask: Array) -> tuple[Array, Array, Array]:
        index, mask = index[0], mask[0]
        values = differ(*(field[index] for field in fields), mask)
        # Added, not set: an index that is not counted may repeat one that is, and its values are 0.
        return tuple(total.at[index].add(value) for total, value in zip(sums, values, strict=True))  # type: ignore[return-value]

    zeros = (jnp.zeros(B * T, jnp.float32),) * 3
    kl, same, right = (values.reshape(B, T) for values in scan_counted(visit, zeros, counted.reshape(1, -1), CHUNK))
    return Comparison(kl, same, right, counted.astype(jnp.float32))


def kl_divergence(logits: Array, other: Array) -> Array:
    """KL(p ‖ q) = Σ_v p_v (log p_v − log q_v), nats, of the distributions given by two logits [..., V] -> [...]."""
    return kl_between(jax.nn.log_softmax(logits), jax.nn.log_softmax(other))


def _head(network: Network) -> tuple[PyTree, float | None]:
    return output_embedding(network.base), network.model.config.final_softcap


def totals(comparison: Comparison, batch: Batch) -> Totals:
    """Sum a comparison over its predictions and examples."""
    wrong = by_segment(comparison.counted - comparison.right, batch)
    examples = by_segment(comparison.counted, batch) > 0
    count = lambda mask: jnp.sum(mask.astype(jnp.float32))
    kl, same, right, predictions = (jnp.sum(field) for field in comparison)
    return Totals(kl, same, right, predictions, solved=count(examples & (wrong == 0)), examples=count(examples))


def means(sums: Totals) -> Means:
    """Divide the sums by the number of predictions or examples; NaN where that is 0."""
    kl, same, right, predictions, solved, examples = (float(np.asarray(value)) for value in sums)
    per = lambda value, count: value / count if count else float("nan")
    return Means(
        kl=per(kl, predictions),
        agreement=per(same, predictions),
        token_accuracy=per(right, predictions),
        accuracy=per(solved, examples),
    )


def measure(tuned: Network, network: Network, batches: Sequence[Batch], where: Where = "answers") -> Totals:
    """Compare a network with the tuned one over several batches of one shape; `means` gives the averages."""
    sums = [_totals(tuned, network, batch, where) for batch in batches]
    return jax.tree.map(lambda *values: sum(values[1:], values[0]), *sums)


@partial(jax.jit, static_argnames="where")
def _totals(tuned: Network, network: Network, batch: Batch, where: Where) -> Totals:
    return totals(compare_networks(tuned, network, batch, where), batch)


@partial(jax.jit, static_argnames="model")
def kl_from_base(model: Model, base: PyTree, steering: Steering, batch: Batch, trained: PyTree | None = None) -> Array:
    """KL(p ‖ q) for each row, p the next-token distribution of the model without its plan, q with it.

    Args:
        model: static; the plan is that of `steering`.
        base: weights.
        steering: the plan's tree.
        batch: [B, T]; only positions that predict a completion token count.
        trained: weights that q has instead of `base`.

    Returns:
        The mean over each row's positions, nats, fp32 [B]; 0 for a row without any.
    """
    plain = Network(Model(config=model.config, attention=model.attention), base, {})
    result = compare_networks(plain, Network(model, base if trained is None else trained, steering), batch)
    return jnp.sum(result.kl, axis=1) / jnp.maximum(jnp.sum(result.counted, axis=1), 1.0)
