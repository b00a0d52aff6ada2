"""The interventions at the sites of a block: which slots act there, in what order, and on which tokens."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike

from jaxsteer.batches import select
from jaxsteer.models.adapters import for_each_token
from jaxsteer.models.strength import at_strength, check_strength
from jaxsteer.sharding import current_mesh, current_platform
from jaxsteer.types import Array, Batch, Context, Plan, PyTree, Slot, Steering, Taps


@dataclass(frozen=True)
class Interventions:
    """A plan in one forward pass: what all its layers share.

    plan      the slots, applied in this order
    masks     by slot: the tokens that it steers, bool [B, T]; None = all
    factors   by slot: its strength, see `forward`; slots not named have 1
    capture   sites whose values are kept
    key       random key of the pass, for methods that draw in training
    train     training mode of the methods
    adapters  with steering of several adapters: that of each token, int32 [B, T]
    """

    plan: Plan = ()
    masks: Mapping[str, Array | None] = field(default_factory=dict)
    factors: Mapping[str, Array] = field(default_factory=dict)
    capture: Sequence[str] = ()
    key: Array | None = None
    train: bool = False
    adapters: Array | None = None

    @classmethod
    def on(
        cls, batch: Batch, plan: Plan, strength: Mapping[str, ArrayLike] | None = None, **shared: Any
    ) -> Interventions:
        """The interventions of a plan on a batch [B, T]: the strength of slots as in `forward`, and the other fields.

        Raises:
            ValueError: a strength of another slot or shape.
        """
        masks = {slot.name: select(slot.positions, batch) for slot in plan}
        return cls(plan, masks, check_strength(plan, strength, batch.tokens.shape), **shared)

    def merges(self, slot: Slot, x: Array, kernel: Array) -> bool:
        """Whether a slot may put its Δ into the kernel of a projection of x [B, T, in], rather than add it to y.

        That costs passes over the kernel and saves passes over y, and over the gradient of x in the backward pass. In
        half precision, or where the device rounds the operands of an fp32 product, small updates would be lost.
        """
        exact = current_platform() == "cpu" and kernel.dtype in (np.float32, np.float64) and x.dtype == kernel.dtype
        faster = x.shape[0] * x.shape[1] * sum(kernel.shape) >= 2 * kernel.size and current_mesh() is None
        same = self.masks[slot.name] is None and slot.name not in self.factors and self.adapters is None
        return exact and faster and same  # Δ at every token


@dataclass(frozen=True)
class Steer:
    """The interventions in one layer. A block calls it at each of its sites; that is all it knows about them.

    shared  what all layers share
    layer   index of the layer, int32 []
    p       the layer's part of the steering tree, see `jaxsteer.models.transformer.spread`; None to steer nothing
    taps    the captured values, filled as the block runs
    """

    shared: Interventions
    layer: Array
    p: Steering | None
    taps: Taps = field(default_factory=dict)

    def __call__(self, site: str, x: Array, y: Array) -> Array:
        """The y of an activation site, steered."""
        return self._apply(self._slots(site), site, x, y)

    def projection(self, site: str, x: Array, kernel: Array, bias: Array | None, product: Callable[[], Array]) -> Array:
        """The y of a projection, steered.

        Args:
            site: one of PROJECTIONS.
            x: the projection's input [B, T, in].
            kernel: [in, out].
            bias: [out], or None.
            product: computes x W + b.
        """
        slots, y = self._slots(site), None
        if slots and self.shared.merges(slots[0], x, kernel):
            y = slots[0].method.project(self._params(slots[0], site), x, self._context(slots[0], site, kernel, bias))
        merged = y is not None
        # Named, so that rematerialisation can keep these products and recompute what is cheap.
        y = checkpoint_name(y if y is not None else product(), site)
        return self._apply(slots[1:] if merged else slots, site, x, y, kernel, bias)

    def _apply(
        self,
        slots: Sequence[Slot],
        site: str,
        x: Array,
        y: Array,
        kernel: Array | None = None,
        bias: Array | None = None,
    ) -> Array:
        """y + Δ of these slots."""
        shared = self.shared
        for slot in slots:
            context = self._context(slot, site, kernel, bias)
            apply = slot.method.apply if shared.adapters is None else for_each_token(slot.method)
            apply = at_strength(apply, shared.factors.get(slot.name))
            y = _steered(apply, self._params(slot, site), x, y, context, shared.masks[slot.name])
        if site in shared.capture:
            self.taps[site] = y
        return y

    def _slots(self, site: str) -> list[Slot]:
        return [] if self.p is None else [slot for slot in self.shared.plan if site in slot.sites]

    def _params(self, slot: Slot, site: str) -> dict[str, Array]:
        assert self.p is not None
        return self.p[slot.name][site]

    def _context(self, slot: Slot, site: str, kernel: Array | None, bias: Array | None) -> Context:
        key = _fold_key(self.shared.key, slot.name, site, self.layer)
        return Context(self.layer, kernel, bias, key, self.shared.train, self.shared.adapters)


def unsteered() -> Steer:
    """No intervention at any site."""
    return Steer(Interventions(), jnp.zeros((), jnp.int32), None)


def _steered(apply: Callable, p: PyTree, x: Array, y: Array, context: Context, mask: Array | None) -> Array:
    """y + Δ where the mask is true, else y. Computed in at least fp32, returned in y's dtype."""
    wide = np.promote_types(y.dtype, np.float32)
    for leaf in jax.tree.leaves(p):
        wide = np.promote_types(wide, leaf.dtype)
    cast = lambda tree: jax.tree.map(lambda leaf: leaf.astype(wide), tree)
    out = apply(cast(p), cast(x), cast(y), context).astype(y.dtype)
    if mask is None:
        return out
    return jnp.where(mask.reshape(mask.shape + (1,) * (y.ndim - 2)), out, y)


def _fold_key(key: Array | None, slot: str, site: str, layer: Array) -> Array | None:
    """A key for one slot, site and layer. By crc32, because Python's hash of a string differs between processes."""
    if key is None:
        return None
    return jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(f"{slot}/{site}".encode())), layer)
