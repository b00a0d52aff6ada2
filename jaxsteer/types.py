"""The vocabulary of jaxsteer: sites, slots, plans, batches, and the protocol that every intervention follows.

Axis letters, here and in every einsum of the project:
    B batch · T query position · S key position · L layers · N heads · K key/value heads · G heads per K (N / K)
    H head dimension · D model width · F feed-forward width · V vocabulary · R rank · A active layers of a slot
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Array = jax.Array
PyTree = Any
Kind = Literal["weight", "activation"]
Initializer = Callable[[Array, tuple[int, ...], DTypeLike], Array]
"""(key, shape, dtype) -> array, as in jax.nn.initializers."""

Directions = tuple[tuple[str, int], ...]
"""Parameters of a method whose vectors are directions: (name, axis over the model width, counted from the end)."""

Steering = dict[str, dict[str, dict[str, Array]]]
"""The steering tree: steering[slot][site][param], each leaf [A, ...] over the slot's active layers."""

PROJECTIONS = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
"""Weight sites: x is the projection's input, y its output."""

ACTIVATIONS = ("attn.heads", "attn", "mlp.in", "mlp", "block")
"""Activation sites.

attn.heads  per-head attention output, before the output projection, [B, T, N, H]; x is the normalised sublayer input
attn, mlp   the sublayer's output, before it is added to the residual stream; x is the normalised sublayer input
mlp.in      the normalised input of the MLP (pre-MLP); x is the residual stream before the norm
block       the residual stream after the block (post-block); x is the block's input
"""

SITES = PROJECTIONS + ACTIVATIONS
"""Every site."""


class SiteDims(NamedTuple):
    """Shapes of a site's input and output for one token: x is [..., *x] and y is [..., *y]."""

    x: tuple[int, ...]
    y: tuple[int, ...]


class ParamSpec(NamedTuple):
    """One parameter of an intervention, for one layer; the callers stack it over layers.

    shape  of one layer's parameter
    axes   a logical name for each dimension ("width", "rank", "heads", ... or None), for the sharding rules
    init   (key, shape, dtype) -> array
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Initializer

    @property
    def adapter_axis(self) -> int:
        """Where an axis of E adapters goes among the dimensions of one layer's parameter: before the rank, so that the
        products of all adapters are one product; first in a parameter without a rank.
        """
        return self.axes.index("rank") if "rank" in self.axes else 0


class Affine(NamedTuple):
    """An affine Δ of one layer, Δ = write · read · y + scale ⊙ y + shift; a part that is zero is None.

    read   [R, *y]
    write  [*y, R]
    scale  [*y]
    shift  [*y]
    """

    read: Array | None = None
    write: Array | None = None
    scale: Array | None = None
    shift: Array | None = None


class Factors(NamedTuple):
    """The update s (B A)ᵀ of one layer's kernel [in, out], as two factors.

    a, b       A [R, in], B [out, R]
    scale      s
    magnitude  [out], what the norm of each output's weights is changed by after it (DoRA); None = nothing
    """

    a: Array
    b: Array
    scale: float
    magnitude: Array | None = None


class Context(NamedTuple):
    """What an intervention may use besides its parameters and the site's x and y."""

    layer: Array
    """0-based layer index, int32 []."""
    kernel: Array | None = None
    """The projection's kernel [in, out] at a weight site; None at an activation site."""
    bias: Array | None = None
    """The projection's bias [out], at a weight site that has one."""
    key: Array | None = None
    """PRNG key of this slot, site and layer; None in evaluation."""
    train: bool = False
    """Training mode: dropout is applied and gates are sampled."""
    adapter: Array | None = None
    """With parameters of E adapters: which of them steers each token, int32 [B, T]; none does outside 0 to E - 1. Only
    methods that are `per_token` see it."""

    def own(self, adapters: int) -> Array:
        """Which of E adapters is the token's own, bool [B, T, E]."""
        assert self.adapter is not None
        return self.adapter[..., None] == jnp.arange(adapters, dtype=jnp.int32).reshape(
            (1,) * self.adapter.ndim + (adapters,)
        )


@runtime_checkable
class Intervention(Protocol):
    """A function at a site, y' = y + Δ(params; x, y). Implementations are frozen (hashable) dataclasses.

    All-zero parameters must leave y bitwise unchanged: layers that a slot does not steer get zeros.
    """

    kind: ClassVar[Kind]
    """The optimizer group of the parameters. A weight method is used at PROJECTIONS, an activation method at
    ACTIVATIONS."""
    constants: ClassVar[tuple[str, ...]] = ()
    """Parameters that never train."""

    reads: ClassVar[Directions] = ()
    """Parameters whose vectors are the directions of y that Δ depends on."""
    writes: ClassVar[Directions] = ()
    """Parameters whose vectors span Δ."""

    per_token: ClassVar[bool] = False
    """Whether `apply` takes the parameters of several adapters too, see `Context.adapter`: it computes its products by
    `jaxsteer.interventions.products`. Other methods are computed with every adapter at every token, which is slow."""
    free: ClassVar[tuple[str, ...]] = ()
    """Settings in which adapters that share a slot may differ: evaluation does not depend on them, or `restated` makes
    up for them."""

    @property
    def orthonormal(self) -> tuple[str, ...]:
        """Parameters [R, D] whose rows the optimizer keeps orthonormal (see `jaxsteer.optim.keep_orthonormal`)."""
        return ()

    def param_specs(self, dims: SiteDims) -> dict[str, ParamSpec]:
        """The parameters of one layer, by name.

        Raises:
            ValueError: the settings do not fit the site, such as a rank above the width.
        """
        ...

    def from_kernel(self, p: Mapping[str, Array], kernel: Array) -> Mapping[str, Array]:
        """The initial parameters of one layer, for methods that start from the kernel [in, out] of the projection."""
        return p

    def apply(self, p: Mapping[str, Array], x: Array, y: Array, ctx: Context) -> Array:
        """y + Δ. x, y and p have one dtype, at least fp32; the caller casts the result back."""
        ...

    def project(self, p: Mapping[str, Array], x: Array, ctx: Context) -> Array | None:
        """x W' + b of a projection, with Δ in its kernel W': for a weight method, another way to compute `apply`.

        None to add Δ to x W + b instead.
        """
        return None

    def shared(self, others: Sequence[Any]) -> Intervention:
        """The method as which this one and others, different in `free` settings alone, are computed in one slot."""
        return self

    def restated(self, p: Mapping[str, Array], target: Any) -> Mapping[str, Array] | None:
        """Parameters for `target`, different in `free` settings alone, that compute in evaluation what p does here.

        They may be smaller than the target's, if zeros added at the end change nothing. None if the target has none.
        """
        return p

    def penalty(self, p: Mapping[str, Array], step: Array) -> Array:
        """The method's penalty for the stacked parameters of one site at a step, added to the loss. Scalar fp32."""
        return jnp.zeros((), jnp.float32)

    def count(self, p: Mapping[str, Array]) -> int:
        """Number of trained scalars in the stacked parameters of one site."""
        return sum(int(leaf.size) for name, leaf in p.items() if name not in self.constants)

    def fold(self, p: Mapping[str, Array], kernel: Array, bias: Array | None) -> tuple[Array, Array | None] | None:
        """One layer's (kernel, bias) of the projection with Δ merged in; None if it cannot be merged."""
        return None

    def factors(self, p: Mapping[str, Array]) -> Factors | None:
        """One layer's update, of a weight method, as two factors; None if it is not such a product."""
        return None

    def affine(self, p: Mapping[str, Array]) -> Affine | None:
        """One layer's Δ in evaluation, of a method at an activation site, as an affine function of y; None if it is
        not one. Which parts are None depends on the settings only, not on the values of p."""
        return None


@dataclass(frozen=True)
class Positions:
    """Which tokens of an example a slot steers, counted within the example, whatever else its row holds.

    kind   all · prompt · completion · last (the token before a completion) · ends
    first  for kind "ends": the number of tokens at the start of the prompt, at most half of it (rounded down)
    last   for kind "ends": the number of tokens at its end, with the same limit, so that the two never overlap
    """

    kind: Literal["all", "prompt", "completion", "last", "ends"] = "all"
    first: int = 0
    last: int = 0

    def __post_init__(self) -> None:
        """Reject settings that select no token."""
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
            if name not in ("first", "last") or name in counts or not number.isdecimal():
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

    name       the slot's key in the steering tree
    method     the intervention
    sites      where it is applied, see SITES
    layers     0-based layer indices, ascending; None = all layers
    positions  which tokens are steered
    """

    name: str
    method: Intervention
    sites: tuple[str, ...]
    layers: tuple[int, ...] | None = None
    positions: Positions = ALL

    def active_layers(self, num_layers: int) -> tuple[int, ...]:
        """The layers with parameters, in a model of `num_layers` blocks."""
        return tuple(range(num_layers)) if self.layers is None else self.layers

    def shares_layer(self, other: Slot) -> bool:
        """Whether the two slots have a layer in common."""
        return self.layers is None or other.layers is None or not set(self.layers).isdisjoint(other.layers)


Plan = tuple[Slot, ...]
"""Slots at the same site are applied in this order, each to the output of the one before."""


class Batch(NamedTuple):
    """Rows of tokens, each with one or several examples; every field is [B, T].

    Examples with one prompt may share it (`jaxsteer.groups`): the prompt without its last token is a segment of its
    own, the trunk, and the segment of each example is the last token of the prompt and a completion.

    tokens          int32 token ids
    segments        int32, 0 = padding, otherwise the number of the example within its row; attention stays inside it
    positions       int32, index of the token within its example, from 0; rotary embeddings and token selection use it
    prompt_lengths  int32, number of tokens before the first completion token of the token's example
    completion      bool, whether the token belongs to a completion; decides, with prompt_lengths, what is steered
    weights         fp32, any real: the token's weight in the loss as a *target* (predicted from the token before it);
                    0 = no target. It does not affect what is steered
    trunks          int32, the segment of the row that the token attends to besides its own, and a trunk's own number in
                    itself; 0 = none. None: no token of the batch has any
    """

    tokens: Array
    segments: Array
    positions: Array
    prompt_lengths: Array
    completion: Array
    weights: Array
    trunks: Array | None = None


class Cache(NamedTuple):
    """The KV cache: keys and values of earlier tokens, one of S entries per token.

    k, v       [L, B, K, S, H]
    segments   int32 [B, S]; entries of segment 0 are not attended to
    positions  int32 [B, S]
    used       int32 [], number of entries filled, the same in every row
    """

    k: Array
    v: Array
    segments: Array
    positions: Array
    used: Array


Taps = dict[str, Array]
"""Captured site outputs: taps[site] is [L, B, T, ...]."""


class Output(NamedTuple):
    """Result of a forward pass.

    hidden  [B, T, D], after the final norm; `jaxsteer.models.transformer.logits_of` gives logits
    cache   the extended cache, if there is one
    taps    the captured site outputs
    """

    hidden: Array
    cache: Cache | None
    taps: Taps
