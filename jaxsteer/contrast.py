"""Fixed steering from pairs of texts, without training: directions between two sides in the residual stream.

The two texts of a pair differ in one concept. With h⁺ᵢ, h⁻ᵢ what is read of the stream after a block, dᵢ = h⁺ᵢ − h⁻ᵢ
and d̄ their mean, a direction of that layer is

    mean        v = d̄                                   difference of means (CAA: Panickssery et al. 2023)
    pca         v = ‖d̄‖ · ±u, u the first principal component of the dᵢ − d̄
    pca_pairs   v = ‖d̄‖ · ±u, u that of ±dᵢ, the differences in both orders (RepE: Zou et al. 2023)

with the sign for which ⟨v, d̄⟩ ≥ 0. All have the norm of d̄, so that one strength means the same for each of them.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.interventions.fixed import FixedVector
from jaxsteer.models.transformer import Model, forward
from jaxsteer.orthogonality import HIGHEST
from jaxsteer.types import ALL, Array, Batch, Plan, Positions, PyTree, Slot, Steering

Direction = Literal["mean", "pca", "pca_pairs"]
"""How a direction is found in the differences between two sides."""

Reading = Literal["last", "all"]
"""What is read of a text: the stream at its last token that counts, or its mean over all tokens that count."""


class Directions(NamedTuple):
    """A direction for each layer.

    vectors  v, fp32 [L, D], as long as the mean difference
    centres  halfway between the means of the two sides, fp32 [L, D]
    """

    vectors: Array
    centres: Array


@partial(jax.jit, static_argnames=("model", "texts", "reading"))
def read_stream(model: Model, base: PyTree, batch: Batch, texts: int, reading: Reading = "last") -> Array:
    """What the residual stream after each block says of each text, in one forward pass of the model without its plan.

    Args:
        model: static; its plan is left out.
        base: weights.
        batch: [B, T], packed or padded. Tokens count whose weight is not 0.
        texts: S, the largest number of texts in a row; static.
        reading: what is read; static.

    Returns:
        fp32 [L, B, S, D], the text with segment number s at s − 1; 0 where there is none, or none of its tokens counts.
    """
    taps = forward(Model(model.config, attention=model.attention), base, {}, batch, capture=("block",)).taps["block"]
    read = _read_tokens(batch, texts, reading)
    # By default accelerators round fp32 operands to TF32 or bf16, but the sides differ by little of a large stream.
    sums = jnp.einsum(
        "lbtd,bst->lbsd", taps, read.astype(taps.dtype), precision=HIGHEST, preferred_element_type=jnp.float32
    )
    return sums / jnp.maximum(jnp.sum(read, axis=-1), 1).astype(jnp.float32)[None, ..., None]


def _read_tokens(batch: Batch, texts: int, reading: Reading) -> Array:
    """The tokens of each text at which the stream is read, bool [B, S, T].

    Raises:
        ValueError: an unknown reading.
    """
    number = jnp.arange(1, texts + 1, dtype=batch.segments.dtype)[None, :, None]
    counted = (batch.segments[:, None] == number) & (batch.weights != 0)[:, None]
    if reading == "all":
        return counted
    if reading != "last":
        raise ValueError(f"what is read of a text? last or all, got {reading!r}")
    positions = jnp.where(counted, batch.positions[:, None], -1)
    return counted & (positions == jnp.max(positions, axis=-1, keepdims=True))


def contrast_directions(positive: Array, negative: Array, direction: Direction = "mean") -> Directions:
    """A direction for each layer, from the negative to the positive side of pairs.

    Args:
        positive, negative: [L, N, D], what is read of the sides of N pairs, see `read_stream`.
        direction: how it is found: `mean` as in CAA (Panickssery et al. 2023, arXiv:2312.06681), `pca`, or `pca_pairs`
            as in RepE (Zou et al. 2023, arXiv:2310.01405), whose pairs are in random order.

    Raises:
        ValueError: different shapes, fewer than 2 pairs, or an unknown direction.
    """
    if positive.ndim != 3 or positive.shape != negative.shape:
        raise ValueError(f"sides of pairs need one shape [L, N, D], got {positive.shape} and {negative.shape}")
    if positive.shape[1] < 2:
        raise ValueError(f"a direction needs at least 2 pairs, got {positive.shape[1]}")
    differences = positive - negative
    mean = jnp.mean(differences, axis=1)
    centres = jnp.mean(positive + negative, axis=1) / 2
    if direction == "mean":
        return Directions(mean, centres)
    if direction not in ("pca", "pca_pairs"):
        raise ValueError(f"no direction {direction!r}: use mean, pca or pca_pairs")
    varied = differences - mean[:, None] if direction == "pca" else differences
    component = jax.lax.map(_first_component, varied)  # a layer at a time, for the memory of the decomposition
    along = jnp.sum(component * mean, axis=-1)
    length = jnp.linalg.norm(mean, axis=-1)
    return Directions(jnp.where(along < 0, -length, length)[:, None] * component, centres)


def _first_component(rows: Array) -> Array:
    """The right singular vector [D] of the largest singular value of rows [N, D]."""
    return jnp.linalg.svd(rows, full_matrices=False)[2][0]


def project_on(directions: Directions, stream: Array) -> Array:
    """2 ⟨h − c, v⟩ / ‖v‖², how far to which side a stream is; with the direction `mean`, the sides' means are at ±1.

    Args:
        directions: v and c of each layer.
        stream: [L, ..., D].

    Returns:
        fp32 [L, ...]; 0 in layers without a direction, where v = 0.
    """
    L, D = directions.vectors.shape
    shape = (L, *(1,) * (stream.ndim - 2), D)
    vectors, centres = (each.reshape(shape) for each in directions)
    squared = jnp.sum(jnp.square(vectors), axis=-1)
    along = jnp.sum((stream.astype(jnp.float32) - centres) * vectors, axis=-1)
    return jnp.where(squared > 0, 2 * along / jnp.where(squared > 0, squared, 1.0), 0.0)


@partial(jax.jit, static_argnames="model")
def token_projections(model: Model, base: PyTree, batch: Batch, directions: Directions) -> Array:
    """`project_on` of the stream at every token, by the model without its plan: fp32 [L, B, T]; 0 at padding."""
    output = forward(Model(model.config, attention=model.attention), base, {}, batch, capture=("block",))
    scores = project_on(directions, output.taps["block"])
    return jnp.where((batch.segments > 0)[None], scores, 0.0)


def told_apart(directions: Directions, positive: Array, negative: Array) -> Array:
    """The share of pairs whose positive side is further along the direction than the negative one, fp32 [L].

    Args:
        directions: of each layer.
        positive, negative: [L, N, D], what is read of the sides of pairs, best of other pairs than the directions'.
    """
    apart = project_on(directions, positive) > project_on(directions, negative)
    return jnp.mean(apart.astype(jnp.float32), axis=1)


def contrast_steering(
    directions: Directions, layer: int, strength: float = 1.0, positions: Positions = ALL
) -> tuple[Plan, Steering]:
    """y' = y + s · v at the output of one block, as an ordinary plan and steering tree.

    Args:
        directions: of each layer.
        layer: which block, from 0.
        strength: s, a part of the vector from now on.
        positions: the tokens that are steered.

    Raises:
        ValueError: no such layer.
    """
    if not 0 <= layer < len(directions.vectors):
        raise ValueError(f"no layer {layer}: the directions are those of layers 0 to {len(directions.vectors) - 1}")
    slot = Slot("contrast", FixedVector(), ("block",), layers=(layer,), positions=positions)
    vector = np.float32(strength) * directions.vectors[layer][None]
    return (slot,), {"contrast": {"block": {"v": vector}}}
