"""The dial sweep: what each strength at each layer does, and what it costs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxsteer.batches import bucket_length
from jaxsteer.contrast import Directions
from jaxsteer.interventions.fixed import FixedVector
from jaxsteer.models.transformer import Model, Network, forward
from jaxsteer.theory.compare import compare_hidden
from jaxsteer.types import Array, Batch, Positions, Slot
from train.contrast.answers import Answered, Answering
from train.contrast.pairs import Sides
from train.contrast.rows import Rows, batch_rows, in_batches
from train.data import TokenizedExample
from train.data.examples import digest_of
from train.evaluation.journal import hash_tree
from train.evaluation.statistics import Estimate, crossed_interval

SLOT = "contrast"


class Cell(NamedTuple):
    """One strength at one layer.

    layer, strength  which; layer −1 and strength 0: the untouched model
    kl        KL(untouched ‖ steered) on neutral text, nats per token
    shift     change of the difference of the sides' log-probabilities, nats per token
    answered  what is said of generated answers; None where none were generated
    """

    layer: int
    strength: float
    kl: Estimate
    shift: Estimate
    answered: Answered | None = None

    @property
    def effect(self) -> Estimate:
        """What the scorer says, where there is one and it was asked; else the shift."""
        score = None if self.answered is None else self.answered.score
        return self.shift if score is None else score

    @property
    def finite(self) -> bool:
        """Whether the steered model still computes."""
        return bool(np.isfinite([self.kl.mean, self.shift.mean]).all())


@dataclass(frozen=True, eq=False)
class Sweep:
    """A model that any of its layers can be steered in, with what is measured.

    network     the untouched model
    directions  of each layer
    positions   the tokens that are steered
    sides       the validation pairs
    neutral     the neutral texts
    answering   prompts to answer
    batch_size  rows of a batch
    """

    network: Network
    directions: Directions
    positions: Positions
    sides: Sides
    neutral: Sequence[TokenizedExample]
    answering: Answering
    batch_size: int

    @cached_property
    def _model(self) -> Model:
        """All layers have a vector, so that one program serves them all; those not steered have zeros."""
        return Model(self.network.model.config, (Slot(SLOT, FixedVector(), ("block",), positions=self.positions),))

    def steered(self, layer: int) -> Network:
        """The model with the vector of one layer."""
        vectors = self.directions.vectors
        chosen = jnp.zeros_like(vectors).at[layer].set(vectors[layer])
        return Network(self._model, self.network.base, {SLOT: {"block": {"v": chosen}}})

    def digest(self) -> str:
        """sha256 of all that cells depend on besides their layer and strength."""
        asked = [each.tokens for each in self.answering.asked]
        texts = [digest_of(some) for some in (*self.sides, self.neutral, asked)]
        parts = (hash_tree(self.directions), self.positions, texts, self.answering.max_new_tokens, self.answering.by)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def untouched(self) -> Cell:
        """The untouched model, with its answers."""
        nothing = Estimate(0.0, 0.0, 0.0)
        (answered,) = self.answering.answer(self.network, SLOT, [0.0])
        return Cell(-1, 0.0, nothing, nothing, answered)

    def measure(self, layer: int, strength: float) -> Cell:
        """The effect on the validation pairs, and the cost on neutral text."""
        network, factor = self.steered(layer), {SLOT: np.float32(strength)}
        kls = [np.asarray(_kl(network, batch, hidden, factor)) for batch, hidden in self._neutral]
        shifts = self._apart(network, factor) - self._apart_before
        return Cell(layer, strength, _estimate(np.concatenate(kls)[: len(self.neutral)]), _estimate(shifts))

    def with_answers(self, cells: Sequence[Cell]) -> list[Cell]:
        """The same with their answers; those of one layer are generated together."""
        found = dict[int, Cell]()
        for layer in dict.fromkeys(cell.layer for cell in cells):
            at = [i for i, cell in enumerate(cells) if cell.layer == layer]
            answered = self.answering.answer(self.steered(layer), SLOT, [cells[i].strength for i in at])
            found |= {i: cells[i]._replace(answered=each) for i, each in zip(at, answered, strict=True)}
        return [found[i] for i in range(len(cells))]

    @cached_property
    def _rows(self) -> Rows:
        return Rows.of([*self.sides.positive, *self.sides.negative], self.batch_size)

    def _apart(self, network: Network, strength: dict[str, np.float32] | None = None) -> np.ndarray:
        """By how much the positive side of each pair is likelier, nats per token."""
        positive, negative = np.split(self._rows.log_probabilities(network, strength), 2)
        return positive - negative

    @cached_property
    def _apart_before(self) -> np.ndarray:
        return self._apart(self.network)

    @cached_property
    def _neutral(self) -> list[tuple[Batch, Array]]:
        """Batches of the neutral texts, with the untouched model's hidden states."""
        length, size = bucket_length(max(map(len, self.neutral))), batch_rows(len(self.neutral), self.batch_size)
        batches = in_batches([[text] for text in self.neutral], length, size)
        return [(batch, _hidden(self.network, batch)) for batch in batches]


@jax.jit
def _hidden(network: Network, batch: Batch) -> Array:
    return network(batch).hidden


@jax.jit
def _kl(network: Network, batch: Batch, before: Array, strength: dict[str, ArrayLike]) -> Array:
    """KL(untouched ‖ steered), the mean over the second half of each text, fp32 [B]."""
    plain = Network(replace(network.model, plan=()), network.base, {})
    after = forward(network.model, network.base, network.steering, batch, strength=strength).hidden
    found = compare_hidden(before, plain, after, network, batch)
    return jnp.sum(found.kl, axis=1) / jnp.maximum(jnp.sum(found.counted, axis=1), 1.0)


def _estimate(values: np.ndarray) -> Estimate:
    """The mean with its interval over examples; NaN where a value is not finite."""
    if not np.isfinite(values).all():
        return Estimate(float("nan"), float("nan"), float("nan"))
    return crossed_interval([values.tolist()])


def affordable(cells: Sequence[Cell], max_kl: float) -> list[Cell]:
    """The cells that cost at most so much.

    Raises:
        ValueError: none; the message says what the cheapest costs.
    """
    finite = [cell for cell in cells if cell.finite]
    if not finite:
        raise ValueError("--strengths: with all of them the model's predictions are not finite; give smaller ones")
    within = [cell for cell in finite if cell.kl.mean <= max_kl]
    if not within:
        least = min(finite, key=lambda cell: cell.kl.mean)
        raise ValueError(
            f"--max-kl {max_kl:g}: every strength moves the model further on neutral text; the least is "
            f"{least.kl.mean:.3g} nats per token, with strength {least.strength:g} at layer {least.layer}. Give "
            "smaller --strengths, or a larger --max-kl"
        )
    return within


def best(cells: Sequence[Cell], before: Cell) -> Cell:
    """The cell with the largest effect.

    Raises:
        ValueError: none does more than the untouched model.
    """
    gain = partial(gain_of, before=before)
    found = max(cells, key=gain)
    if not gain(found) > 0:
        raise ValueError(
            f"no strength within --max-kl has an effect: the largest is {gain(found):+.3g}, with strength "
            f"{found.strength:g} at layer {found.layer}. The pairs may not hold a concept that this model has, or "
            "their sides are exchanged; try more pairs, other --layers, or --reading all"
        )
    return found


def gain_of(cell: Cell, before: Cell) -> float:
    """The effect beyond the untouched model's."""
    return cell.effect.mean - before.effect.mean
