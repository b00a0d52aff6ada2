"""Learning a teacher's next-token distribution: forward KL, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from jaxsteer.models.transformer import Model, Network, forward, logits_of, output_embedding
from jaxsteer.objectives.objective import Mean, Objective, Summed
from jaxsteer.objectives.tokens import chunk_width, counted_tokens, next_tokens, scan_counted
from jaxsteer.ranges import Positive, check_ranges
from jaxsteer.sharding import constrain
from jaxsteer.types import Array, Batch, PyTree, Steering


class Taught(NamedTuple):
    """The same completions as the student and as the teacher read them.

    batch    the student's rows [B, T]; tokens count whose weight is not 0
    teacher  the teacher's rows [B, T'], with other prompts perhaps: the i-th token that counts in a row is the i-th one
             of the student's row. Where a row has not as many of them as the student's, its loss is NaN
    """

    batch: Batch
    teacher: Batch


class Predictions(NamedTuple):
    """What gives next-token distributions.

    hidden   [..., D], after the final norm
    head     output embedding [V, D]
    softcap  logit soft-cap, see `jaxsteer.models.transformer.logits_of`
    """

    hidden: Array
    head: Array
    softcap: float | None

    def log_probabilities(self, temperature: float = 1.0) -> Array:
        """[..., V], natural logarithm."""
        return jax.nn.log_softmax(logits_of(self.hidden, self.head, self.softcap) / temperature)


def predictions(network: Network, batch: Batch) -> Predictions:
    """A network's predictions on a batch, hidden [B, T, D]."""
    return Predictions(network(batch).hidden, output_embedding(network.base), network.model.config.final_softcap)


def kl_between(teacher: Array, student: Array) -> Array:
    """KL(p ‖ q) = Σ_v p_v (log p_v − log q_v), nats, of log-probabilities [..., V] -> [...]."""
    return jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)


@partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _token_kl(hidden: Array, head: Array, teacher: Array, softcap: float | None, temperature: float) -> Array:
    """KL of the student from the teacher's log-probabilities [M, V] at each of M positions. The gradient with respect
    to `hidden` is computed in the forward pass, while the logits exist."""
    return kl_between(teacher, Predictions(hidden, head, softcap).log_probabilities(temperature))


@partial(_token_kl.defjvp, symbolic_zeros=True)
def _token_kl_jvp(softcap: float | None, temperature: float, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    hidden, head, teacher = primals
    hidden_dot, head_dot, _ = tangents  # the teacher has no gradient

    def of(hidden: Array, head: Array) -> Array:
        return kl_between(teacher, Predictions(hidden, head, softcap).log_probabilities(temperature))

    kl, pull = jax.vjp(partial(of, head=head), hidden)
    out = jnp.zeros_like(kl)
    if type(hidden_dot) is not SymbolicZero:
        (slope,) = pull(jnp.ones_like(kl))  # each row's KL depends on its own hidden state alone
        out += jnp.einsum("md,md->m", slope, hidden_dot.astype(slope.dtype)).astype(out.dtype)
    if type(head_dot) is not SymbolicZero:  # the head is trained: recompute its logits
        out += jax.jvp(jax.checkpoint(lambda w: of(hidden, w)), (head,), (head_dot,))[1]
    return kl, out


def counted_kl(student: Predictions, taught: Taught, teacher: Predictions, temperature: float = 1.0) -> Array:
    """KL(teacher ‖ student) of the prediction of every token that counts, nats, at the token itself.

    Args:
        student: hidden [B, T, D].
        taught: the rows.
        teacher: hidden [B, T', D'], over the same vocabulary.
        temperature: what both logits are divided by.

    Returns:
        [B, T]; 0 at tokens that do not count, NaN in rows where the teacher's do not correspond.
    """
    counts = next_tokens(taught.batch).weights != 0
    places, alike = _places(taught, counts)
    kl = jnp.where(counts & ~alike, jnp.nan, kl_at(student, teacher, counts, places, temperature))
    return jnp.pad(kl[:, :-1], ((0, 0), (1, 0)))  # from the position that predicts to the token


def kl_at(student: Predictions, teacher: Predictions, counts: Array, places: Array, temperature: float = 1.0) -> Array:
    """KL(teacher ‖ student) at some positions, differentiable in the student.

    Args:
        student: hidden [B, T, D].
        teacher: hidden [B, T', D'], over the same vocabulary; it has no gradient.
        counts: the student's positions that count, bool [B, T].
        places: the teacher's position for each of the student's, int32 [B, T].
        temperature: what both logits are divided by.

    Returns:
        [B, T] in nats, 0 where none counts. No [B, T, V] array exists, nor is one kept for the backward pass.
    """
    (B, T), row = counts.shape, jnp.arange(counts.shape[0])[:, None]
    hidden, head = constrain(student.hidden, "rows", None, None), constrain(student.head, "vocab", None)
    fixed = jax.lax.stop_gradient((teacher.hidden, constrain(teacher.head, "vocab", None)))
    known = teacher._replace(hidden=fixed[0], head=fixed[1])

    def visit(found: Array, index: Array, mask: Array) -> Array:
        take = lambda field, at: jnp.where(mask[..., None], jnp.take_along_axis(field, at[..., None], axis=1), 0)
        own = take(hidden, index).reshape(-1, hidden.shape[-1])
        theirs = take(known.hidden, jnp.take_along_axis(places, index, axis=1)).reshape(-1, known.hidden.shape[-1])
        target = known._replace(hidden=theirs).log_probabilities(temperature)
        kl = _token_kl(own, head, target, student.softcap, temperature).reshape(index.shape)
        at = jnp.where(mask, index, T)  # an index past the end is dropped
        return found.at[row, at].add(kl.astype(found.dtype), mode="drop")

    zeros = jnp.zeros((B, T), np.promote_types(hidden.dtype, np.float32))
    return scan_counted(visit, zeros, counts, chunk_width(B, T))


def _places(taught: Taught, counts: Array) -> tuple[Array, Array]:
    """For each position of the student that predicts a token which counts, that of the teacher, int32 [B, T]; and for
    each row whether there are as many of them, bool [B, 1]."""
    theirs = next_tokens(taught.teacher).weights != 0
    order = jnp.argsort(~theirs, axis=1, stable=True)
    rank = jnp.clip(jnp.cumsum(counts, axis=1) - 1, 0, order.shape[1] - 1)
    number = lambda mask: jnp.sum(mask, axis=1, keepdims=True)
    return jnp.take_along_axis(order, rank, axis=1), number(theirs) == number(counts)


@dataclass(frozen=True)
class Distillation(Objective):
    """τ² KL(p ‖ q), the mean over tokens, of teacher p and student q at temperature τ; its inputs are `Taught`.

    It is given the teacher, a `Network`. The factor keeps the gradient's size (Hinton et al. 2015, arXiv 1503.02531,
    section 2).

    temperature  τ
    """

    temperature: Positive = 1.0

    def __post_init__(self) -> None:
        """Reject a temperature that is none."""
        check_ranges(self, "")

    def total(self, inputs: Taught) -> Array:
        """The number of tokens."""
        return jnp.sum(counted_tokens(inputs.batch)).astype(jnp.float32)

    def __call__(
        self,
        model: Model,
        base: PyTree,
        steering: Steering,
        inputs: Taught,
        given: Network,
        key: Array | None,
        *,
        train: bool,
    ) -> Summed:
        """The loss summed over the tokens of a microbatch; facts are means over tokens."""
        hidden = forward(model, base, steering, inputs.batch, key=key, train=train).hidden
        student = Predictions(hidden, output_embedding(base), model.config.final_softcap)
        kl = counted_kl(student, inputs, predictions(given, inputs.teacher), self.temperature)
        summed = jnp.sum(kl)
        return Summed(self.temperature**2 * summed, {"teacher_kl": Mean(summed, self.total(inputs))})
