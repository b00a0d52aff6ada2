"""LoFiT: scale all attention heads to find those that matter, then shift only these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.interventions.heads import head_vectors, heads_and_width
from jaxsteer.interventions.products import vector
from jaxsteer.types import Affine, Array, Context, Intervention, Kind, ParamSpec, SiteDims


@dataclass(frozen=True)
class LoFiTScale(Intervention):
    """z' = z + A ⊙ z for every head z [H], with the penalty l1 · ‖A‖₁: LoFiT's first stage (Yin et al. 2024).

    arXiv 2406.01563. A starts at zero. `strongest_heads` then ranks the heads by ‖A‖₂.

    l1  weight of the penalty Σ|A|
    """

    kind: ClassVar[Kind] = "activation"
    per_token: ClassVar[bool] = True
    free: ClassVar[tuple[str, ...]] = ("l1",)
    l1: float = 5e-4

    def param_specs(self, dims: SiteDims) -> dict[str, ParamSpec]:
        """A [N, H]."""
        return {"A": head_vectors(dims, "LoFiT")}

    def apply(self, p: Mapping[str, Array], x: Array, y: Array, ctx: Context) -> Array:
        """z + A ⊙ z."""
        return y + vector(p["A"], y.ndim, ctx) * y

    def affine(self, p: Mapping[str, Array]) -> Affine:
        """Δ = A ⊙ z."""
        return Affine(scale=p["A"])

    def penalty(self, p: Mapping[str, Array], step: Array) -> Array:
        """l1 · Σ|A|."""
        # Not jnp.abs: its gradient is 1 at 0, where A starts, which would push every scale down.
        return self.l1 * jnp.sum(p["A"] * jnp.sign(p["A"])).astype(jnp.float32)


@dataclass(frozen=True)
class LoFiT(Intervention):
    """z' = z + v for the selected heads z [H]: LoFiT's second stage (Yin et al. 2024). v starts at zero.

    The selection is a constant, 1 or 0 for each head; initially all are selected. `strongest_heads` or `select_heads`
    makes another one.
    """

    kind: ClassVar[Kind] = "activation"
    per_token: ClassVar[bool] = True
    constants: ClassVar[tuple[str, ...]] = ("selected",)

    def param_specs(self, dims: SiteDims) -> dict[str, ParamSpec]:
        """v [N, H], selected [N]."""
        heads, _ = heads_and_width(dims, "LoFiT")
        return {
            "v": head_vectors(dims, "LoFiT"),
            "selected": ParamSpec((heads,), ("heads",), jax.nn.initializers.ones),
        }

    def apply(self, p: Mapping[str, Array], x: Array, y: Array, ctx: Context) -> Array:
        """z + v at the selected heads."""
        return y + vector(p["selected"][..., None] * p["v"], y.ndim, ctx)

    def affine(self, p: Mapping[str, Array]) -> Affine:
        """Δ = v at the selected heads."""
        return Affine(shift=p["selected"][:, None] * p["v"])

    def count(self, p: Mapping[str, Array]) -> int:
        """Number of scalars of the selected heads; of all heads if only shapes are given."""
        if isinstance(p["selected"], jax.ShapeDtypeStruct):
            return int(p["v"].size)
        return int(np.sum(np.asarray(p["selected"]))) * p["v"].shape[-1]


def strongest_heads(scales: Array, count: int) -> Array:
    """Select the `count` heads with the largest ‖A‖₂ over all layers.

    Args:
        scales: A [A, N, H] of a trained `LoFiTScale`.
        count: number of heads to select.

    Returns:
        fp32 [A, N], 1 for the selected heads and 0 for the others. Ties go to the earlier head.

    Raises:
        ValueError: `count` is below 1 or above the number of heads.
    """
    layers, heads, _ = scales.shape
    if not 1 <= count <= layers * heads:
        raise ValueError(f"LoFiT: cannot select {count} heads of {layers} layers with {heads} each")
    norms = jnp.linalg.norm(scales, axis=-1).reshape(-1)
    chosen = jnp.argsort(-norms, stable=True)[:count]
    return jnp.zeros(layers * heads).at[chosen].set(1.0).reshape(layers, heads)


def select_heads(active_layers: tuple[int, ...], heads: int, chosen: tuple[tuple[int, int], ...]) -> Array:
    """The selection of given heads, for `LoFiT`.

    Args:
        active_layers: the slot's layers.
        heads: number of heads per layer, N.
        chosen: (layer, head) pairs, 0-based.

    Returns:
        fp32 [A, N], 1 for the chosen heads and 0 for the others.

    Raises:
        ValueError: no pair, or one that the slot or the model does not have.
    """
    if not chosen:
        raise ValueError("LoFiT: choose at least one (layer, head) pair")
    selected = np.zeros((len(active_layers), heads), np.float32)
    for layer, head in chosen:
        if layer not in active_layers:
            raise ValueError(f"LoFiT: head ({layer}, {head}): the slot's layers are {list(active_layers)}")
        if not 0 <= head < heads:
            raise ValueError(f"LoFiT: head ({layer}, {head}): the model's heads are 0 to {heads - 1}")
        selected[active_layers.index(layer), head] = 1
    return jnp.asarray(selected)
