"""The vocabulary of jaxsteer: sites, slots, plans, batches, and the protocol that every intervention follows.

Axis letters, here and in every einsum of the project:
    B batch · T query position · S key position · L layer · N heads · K key/value heads · G groups (N / K)
    H head dim · D model width · F feed-forward width · V vocabulary · R rank · A active layers of a slot
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

Array = jax.Array
PyTree = Any
Kind = Literal["weight", "activation"]
Initializer = Callable[[Array, tuple[int, ...], Any], Array]
"""(key, shape, dtype) -> array, as in jax.nn.initializers."""

Directions = tuple[tuple[str, int], ...]
"""Parameters of a method that are bundles of directions: (name, the axis over the width, counted from the end)."""

Steering = dict[str, dict[str, dict[str, Array]]]
"""steering[slot][site][param], each leaf with a leading axis of the slot's active layers."""

PROJECTIONS = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
"""Weight sites: x is the projection's input, y its output."""

ACTIVATIONS = ("attn.heads", "attn", "mlp.in", "mlp", "block")
"""Activation sites.

attn.heads  per-head attention output before the output projection, [B, T, N, H]; x is the normalised sublayer input
attn, mlp   the sublayer's contribution just before its residual add; x is the normalised sublayer input
mlp.in      the normalised input of the MLP (pre-MLP); x is the residual stream before the norm
block       the residual stream after the block (post-block); x is the block's input
"""

SITES = PROJECTIONS + ACTIVATIONS
"""Every site."""


class SiteDims(NamedTuple):
    """Shapes at one site, without batch and position: x is `[..., *x]` and y is `[..., *y]`."""

    x: tuple[int, ...]
    y: tuple[int, ...]


class ParamSpec(NamedTuple):
    """One parameter of an intervention, for one layer; stacking over layers is generic.

    axes names each dimension logically ("width", "rank", "heads", ... or None) for the sharding rules.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Initializer


class Context(NamedTuple):
    """What an intervention may look at besides its own parameters and the site's x and y."""

    layer: Array
    """0-based index of the layer, int32 []."""
    kernel: Array | None = None
    """The projection's kernel [in, out] at a weight site; None at an activation site."""
    bias: Array | None = None
    """The projection's bias [out] at a weight site that has one."""
    key: Array | None = None
    """A key of this slot, site and layer for anything random; None when evaluating."""
    train: bool = False


@runtime_checkable
class Intervention(Protocol):
    """A function at a site, y' = y + Δ(params; x, y); implementations are frozen (hashable) dataclasses.

    All-zero parameters must leave y bitwise unchanged: layers that a slot does not steer receive zeros.
    """

    kind: ClassVar[Kind]
    """Which optimizer group the parameters belong to; a weight method sits at PROJECTIONS, an activation method
    at ACTIVATIONS."""
    constants: ClassVar[tuple[str, ...]] = ()
    """Parameters that never train, whatever the labels of the rest."""

    reads: ClassVar[Directions] = ()
    """Parameters whose vectors are the directions that Δ reads of y."""
    writes: ClassVar[Directions] = ()
    """Parameters whose vectors are the directions that Δ is made of."""

    @property
    def orthonormal(self) -> tuple[str, ...]:
        """Parameters [R, D] whose rows the optimizer keeps orthonormal (see `jaxsteer.optim.keep_orthonormal`)."""
        return ()

    def param_specs(self, dims: SiteDims) -> dict[str, ParamSpec]:
        """Parameters of one layer. Raises ValueError where the settings do not fit the site (rank > width, ...)."""
        ...

    def from_kernel(self, p: Mapping[str, Array], kernel: Array) -> Mapping[str, Array]:
        """The initial parameters of one layer, for methods that start from the projection's kernel [in, out]."""
        return p

    def apply(self, p: Mapping[str, Array], x: Array, y: Array, ctx: Context) -> Array:
        """y + Δ. x, y and p arrive in one dtype of at least fp32; the caller casts the result back."""
        ...

    def penalty(self, p: Mapping[str, Array], step: Array) -> Array:
        """The method's own term in the loss, for the stacked parameters of one site; 0 for most. Scalar fp32."""
        return jnp.zeros((), jnp.float32)

    def count(self, p: Mapping[str, Array]) -> int:
        """Number of scalars that train, in the stacked parameters of one site."""
        return sum(int(leaf.size) for name, leaf in p.items() if name not in self.constants)

    def fold(self, p: Mapping[str, Array], kernel: Array, bias: Array | None) -> tuple[Array, Array | None] | None:
        """The projection's (kernel, bias) with Δ merged in, for one layer; None when it cannot be merged."""
        return None


@dataclass(frozen=True)
class Positions:
    """Which tokens of an example a slot steers; counted inside the example, whatever the row around it holds.

    kind        all · prompt · completion · last · ends
    first, last for kind "ends": the first and the last so many tokens of the prompt, each at most half of it (rounded
                down), so that a slot at the first and one at the last never meet
    """

    kind: Literal["all", "prompt", "completion", "last", "ends"] = "all"
    first: int = 0
    last: int = 0

    def __post_init__(self) -> None:
        """Reject what could never select a token."""
        if self.kind not in ("all", "prompt", "completion", "last", "ends"):
            raise ValueError(f"unknown positions {self.kind!r}: use all, prompt, completion, last or first:n+last:n")
        if self.kind == "ends" and (min(self.first, self.last) < 0 or self.first + self.last == 0):
            raise ValueError(f"positions {self}: first and last must be at least 0 and not both 0")
        if self.kind != "ends" and (self.first or self.last):
            raise ValueError(f"positions {self.kind!r} takes no first/last count")

    @classmethod
    def parse(cls, text: str) -> Positions:
        """Read "all", "prompt", "completion", "last", "first:n", "last:n" or "first:n+last:n"."""
        if ":" not in text:
            return cls(text)  # type: ignore[arg-type]  # checked in __post_init__
        counts: dict[str, int] = {}
        for part in text.split("+"):
            name, _, number = part.partition(":")
            if name not in ("first", "last") or name in counts or not number.isdigit():
                raise ValueError(f"positions {text!r}: expected first:n, last:n or first:n+last:n")
            counts[name] = int(number)
        return cls("ends", counts.get("first", 0), counts.get("last", 0))

    def __str__(self) -> str:
        """The text that `parse` reads."""
        if self.kind != "ends":
            return self.kind
        return "+".join(f"{n}:{c}" for n, c in (("first", self.first), ("last", self.last)) if c)


ALL = Positions()


@dataclass(frozen=True)
class Slot:
    """One method at some sites of some layers: the unit of a plan.

    name       key of the slot in the steering pytree
    method     the intervention
    sites      site names, see SITES
    layers     0-based layer indices, ascending; None = every layer
    positions  which tokens are steered
    """

    name: str
    method: Intervention
    sites: tuple[str, ...]
    layers: tuple[int, ...] | None = None
    positions: Positions = ALL

    def active_layers(self, num_layers: int) -> tuple[int, ...]:
        """The layers that carry parameters, in a model of `num_layers` blocks."""
        return tuple(range(num_layers)) if self.layers is None else self.layers


Plan = tuple[Slot, ...]
"""Slots at one site compose in this order: each sees the y that the one before left."""


class Batch(NamedTuple):
    """Rows of tokens, each row holding one or several examples; every field is [B, T].

    tokens          int32 token ids
    segments        int32, 0 = padding, otherwise the number of the example within its row (tokens attend inside it)
    positions       int32, index of the token within its example, from 0 (rotary and token selection count here)
    prompt_lengths  int32, the prompt's length of the example that the token belongs to: all before its first
                    completion token
    completion      bool, whether the token belongs to a completion: decides, with prompt_lengths, what is steered
    weights         fp32, any real: the token's weight in the loss as a *target* (predicted from the token before it);
                    0 = no target. It never changes what is steered
    """

    tokens: Array
    segments: Array
    positions: Array
    prompt_lengths: Array
    completion: Array
    weights: Array


class Cache(NamedTuple):
    """Keys and values of earlier tokens, one slot (S) a token; `used` slots are filled in every row.

    k, v [L, B, K, S, H] · segments, positions [B, S] (segment 0 = not to be attended) · used int32 []
    """

    k: Array
    v: Array
    segments: Array
    positions: Array
    used: Array


Taps = dict[str, Array]
"""Captured site outputs: taps[site] is [L, B, T, ...]."""


class Output(NamedTuple):
    """Result of a forward pass. hidden [B, T, D] is taken after the final norm; logits are the objective's affair."""

    hidden: Array
    cache: Cache | None
    taps: Taps
