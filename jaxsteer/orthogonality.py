"""Joint adaptation: weight updates and steering in one plan, kept out of each other's subspaces.

Per layer, B [D, R] collects the directions that LoRA writes to the residual stream (behind a norm, where the family has
one there) and S [r, D] those that steering reads from it (or writes to it). With the ridge projector
P = B (BᵀB + εI)⁻¹ Bᵀ, ε = 1e-6 · tr(BᵀB)/R + 1e-12, their overlap is Ω = tr(S P Sᵀ) / ‖S‖²: 0 where they share nothing,
1 where S lies in the span of B; R/D is chance. The penalty is tr(S P Sᵀ) (or Ω) in the loss; the projection takes the
span of B out of S after an update.
arXiv 2603.00425, joint adaptation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxsteer.steering import with_leaf
from jaxsteer.types import Array, Plan, PyTree, Slot, Steering

STEERED = ("block", "attn", "mlp")
"""Sites whose vectors live in the residual stream."""
WRITERS = ("mlp.down", "attn.o")
"""Projections that write to the residual stream."""
RIDGE, FLOOR = 1e-6, 1e-12
"""ε = RIDGE · tr(BᵀB)/R + FLOOR; FLOOR is also the least ‖S‖² that Ω divides by, so that S = 0 has Ω = 0."""
Scales = Mapping[str, Array]
"""Writing projection -> factors [L, D] that a norm behind it puts on what it writes: diag(g) B stands for B then."""
NO_SCALES: Scales = {}
HIGHEST = jax.lax.Precision.HIGHEST


@dataclass(frozen=True)
class Orthogonality:
    """How LoRA and steering of one plan are kept apart."""

    mode: Literal["auto", "none", "penalty", "projection"] = "auto"
    """penalty: a term in the loss; projection: LoRA's directions are taken out of the steering after an update; auto:
    the penalty where the plan holds both LoRA and steering of the residual stream, else none."""
    strength: float = 3.0
    """Factor on the penalty, summed over the layers."""
    normalised: bool = False
    """The penalty is Ω, whatever the steering's size, instead of tr(S P Sᵀ)."""
    side: Literal["reads", "writes", "both"] = "reads"
    """Which directions of the steering are kept apart: those it reads (D), those it writes (U), or both."""
    sites: tuple[str, ...] = ("mlp.down",)
    """The projections whose LoRA counts: mlp.down, attn.o, or both."""
    through_lora: bool = False
    """Let the penalty's gradient reach LoRA too. It grows like 1/‖B‖ near B = 0."""
    every: int = 1
    """Updates between projections."""

    def __post_init__(self) -> None:
        """Reject settings without a meaning."""
        if self.mode not in ("auto", "none", "penalty", "projection"):
            raise ValueError(f"orthogonality.mode: auto, none, penalty or projection; got {self.mode!r}")
        if self.side not in ("reads", "writes", "both"):
            raise ValueError(f"orthogonality.side: reads, writes or both; got {self.side!r}")
        if not self.sites or not set(self.sites) <= set(WRITERS):
            raise ValueError(f"orthogonality.sites: out of {', '.join(WRITERS)}, at least one; got {self.sites}")
        if not self.strength > 0 or self.every < 1:
            raise ValueError(
                f"orthogonality: strength must be above 0 and every at least 1; got {self.strength}, {self.every}"
            )

    def resolve(self, plan: Plan) -> Orthogonality:
        """The mode that `auto` means for a plan, after checking that the plan can be kept apart at all.

        Raises:
            ValueError: a constraint is asked for, or meant by `auto`, and the plan has nothing that it could act on.
        """
        if self.mode == "none":
            return self
        lora = [slot for slot in plan if slot.method.kind == "weight"]
        steered, writers = _steered(plan, self), _writers(plan, self)
        if self.mode == "auto" and not (lora and steered):
            return replace(self, mode="none")
        if not steered:
            raise ValueError(
                f"orthogonality.mode {self.mode}: no slot has directions in the residual stream (side {self.side}); "
                f"steer {', '.join(STEERED)} by a low-rank method, or set orthogonality.mode to none"
            )
        if not writers:
            have = ", ".join(sorted({site for slot in lora for site in slot.sites})) or "no LoRA"
            raise ValueError(
                f"orthogonality.mode {self.mode}: no LoRA writes to the residual stream at {', '.join(self.sites)} "
                f"(the plan has {have}); add one of {', '.join(WRITERS)}, or set orthogonality.mode to none"
            )
        if not any(_share_a_layer(a.slot, b.slot) for a in steered for b in writers):
            raise ValueError(
                f"orthogonality.mode {self.mode}: LoRA at {', '.join(self.sites)} and steering share no layer; "
                "let them meet in one, or set orthogonality.mode to none"
            )
        return replace(self, mode="penalty") if self.mode == "auto" else self


def _share_a_layer(one: Slot, other: Slot) -> bool:
    return one.layers is None or other.layers is None or not set(one.layers).isdisjoint(other.layers)


class Bundle(NamedTuple):
    """One parameter that is a bundle of directions: its place in the steering pytree and its axis over the width."""

    slot: Slot
    site: str
    name: str
    axis: int

    def leaf(self, steering: Steering) -> Array:
        """The parameter."""
        return steering[self.slot.name][self.site][self.name]

    def layers(self, steering: Steering) -> tuple[int, ...]:
        """The layers that it has directions in."""
        return self.slot.active_layers(self.leaf(steering).shape[0])

    def to_rows(self, leaf: Array) -> Array:
        """Directions in the parameter's layout -> rows [A, r, D]."""
        rows = jnp.moveaxis(leaf, self.axis, -1)
        return rows.reshape(rows.shape[0], -1, rows.shape[-1])

    def from_rows(self, rows: Array, like: Array) -> Array:
        """Undo `to_rows`."""
        return jnp.moveaxis(rows.reshape(jnp.moveaxis(like, self.axis, -1).shape), -1, self.axis)

    def within(self, leaf: Array, basis: Array) -> Array:
        """S VᵀV in the parameter's layout: what of its directions lies in the span of orthonormal rows V [A, R, D]."""
        weights = jnp.einsum("nrd,nsd->nrs", self.to_rows(leaf), basis, precision=HIGHEST)
        return self.from_rows(jnp.einsum("nrs,nsd->nrd", weights, basis, precision=HIGHEST), leaf)


def _bundles(plan: Plan, side: str) -> Iterator[Bundle]:
    """The steering's directions, each parameter once."""
    for slot in plan:
        if slot.method.kind == "activation":
            reads = slot.method.reads if side in ("reads", "both") else ()
            writes = slot.method.writes if side in ("writes", "both") else ()
            for site in slot.sites:
                for name, axis in dict.fromkeys((*reads, *writes)):
                    yield Bundle(slot, site, name, axis)


def _steered(plan: Plan, settings: Orthogonality) -> list[Bundle]:
    return [part for part in _bundles(plan, settings.side) if part.site in STEERED]


def _writers(plan: Plan, settings: Orthogonality) -> list[Bundle]:
    return [
        Bundle(slot, site, name, axis)
        for slot in plan
        if slot.method.kind == "weight"
        for site in slot.sites
        if site in settings.sites
        for name, axis in slot.method.writes
    ]


def joint_layers(plan: Plan, steering: Steering, settings: Orthogonality) -> tuple[int, ...]:
    """The layers in which LoRA and steering meet, ascending."""
    where = lambda parts: {layer for part in parts for layer in part.layers(steering)}
    return tuple(sorted(where(_steered(plan, settings)) & where(_writers(plan, settings))))


def _gather(parts: list[Bundle], steering: Steering, layers: tuple[int, ...], scales: Scales = NO_SCALES) -> Array:
    """All directions of each of `layers` as rows, [len(layers), r, D]; zero rows where a slot is not active."""

    def rows(part: Bundle) -> Array:
        found, active = part.to_rows(part.leaf(steering)), part.layers(steering)
        if part.site in scales:
            found = found * scales[part.site][jnp.array(active, jnp.int32), None].astype(found.dtype)
        return _at(layers, found, active)

    return jnp.concatenate([rows(part) for part in parts], axis=1)


def _at(layers: tuple[int, ...], rows: Array, have: tuple[int, ...]) -> Array:
    """The rows [len(have), r, D] of the layers `have` at the places of `layers`, zeros where there are none."""
    if have == layers:
        return rows
    kept = [layer for layer in have if layer in layers]
    places = lambda of: jnp.array([of.index(layer) for layer in kept], jnp.int32)
    return jnp.zeros((len(layers), *rows.shape[1:]), rows.dtype).at[places(layers)].set(rows[places(have)])


class Shared(NamedTuple):
    """Per joint layer, fp32 [n]: what lies inside LoRA's span, tr(S P Sᵀ), and the whole, ‖S‖²."""

    inside: Array
    whole: Array


def ridge_basis(written: Array, ridge: float, floor: float) -> Array:
    """V [n, R, D] with VᵀV = B (BᵀB + εI)⁻¹ Bᵀ, ε = ridge · tr(BᵀB)/R + floor, for Bᵀ [n, R, D]; 0 at B = 0.

    Vᵀ is the upper part of an orthonormal basis of the columns of [B; √ε I], whose Gram matrix is BᵀB + εI. That is
    never formed: in fp32 its rounding would drown ε, and dependent columns of B give NaN.
    """
    size, width = written.shape[-2:]
    epsilon = ridge / size * jnp.sum(written**2, axis=(1, 2)) + floor
    lower = jnp.sqrt(epsilon)[:, None, None] * jnp.eye(size, dtype=written.dtype)[None]
    basis, _ = jnp.linalg.qr(jnp.concatenate([written.swapaxes(1, 2), lower], axis=1))
    return basis[:, :width].swapaxes(1, 2)


def shared_energy(steered: Array, written: Array) -> Shared:
    """tr(S P Sᵀ) = ‖S Q‖² and ‖S‖² for S [n, r, D] and Bᵀ [n, R, D].

    P = VᵀV for the ridge basis V of B.
    """
    basis = ridge_basis(written, RIDGE, FLOOR)
    inside = jnp.einsum("nsd,nrd->nsr", steered, basis, precision=HIGHEST)
    return Shared(jnp.sum(inside**2, axis=(1, 2)), jnp.sum(steered**2, axis=(1, 2)))


def _shared(plan: Plan, steering: Steering, settings: Orthogonality, scales: Scales) -> Shared:
    layers = joint_layers(plan, steering, settings)
    written = _gather(_writers(plan, settings), steering, layers, jax.lax.stop_gradient(scales))
    if not settings.through_lora:
        written = jax.lax.stop_gradient(written)
    return shared_energy(_gather(_steered(plan, settings), steering, layers), written)


def joint_overlap(
    plan: Plan, steering: Steering, settings: Orthogonality = Orthogonality(), scales: Scales = NO_SCALES
) -> Array:
    """Ω of each joint layer (`joint_layers`), fp32 [n] in [0, 1]; [0] where the plan has none."""
    if not joint_layers(plan, steering, settings):
        return jnp.zeros(0, jnp.float32)
    return _ratio(_shared(plan, steering, settings, scales)).astype(jnp.float32)


def _ratio(shared: Shared) -> Array:
    return shared.inside / jnp.maximum(shared.whole, FLOOR)


def chance_overlap(plan: Plan, steering: Steering, settings: Orthogonality = Orthogonality()) -> float:
    """R/D, the mean overlap of random directions with LoRA's span; 0 where the plan has no joint layer."""
    layers = joint_layers(plan, steering, settings)
    if not layers:
        return 0.0
    _, rank, width = _gather(_writers(plan, settings), steering, layers).shape
    return min(1.0, rank / width)


def overlap_penalty(
    plan: Plan,
    steering: Steering,
    settings: Orthogonality = Orthogonality("penalty"),
    scales: Scales = NO_SCALES,
) -> Array:
    """strength · Σ over the layers of Ω, or of tr(S P Sᵀ) where not normalised; 0 unless the mode is penalty."""
    if settings.mode != "penalty":
        return jnp.zeros((), jnp.float32)
    shared = _shared(plan, steering, settings, scales)
    terms = _ratio(shared) if settings.normalised else shared.inside
    return settings.strength * jnp.sum(terms).astype(jnp.float32)


def write_basis(written: Array) -> Array:
    """Rows V [n, R, D] whose VᵀV projects onto the span of rows Bᵀ [n, R, D], as far as the overlap sees it.

    Its ridge is the overlap's times 1e-6: S − S VᵀV keeps ε'/(σ² + ε') of a direction of strength σ, of which the
    overlap counts σ²/(σ² + ε), together at most ε'/4ε. A direction beneath rounding is in neither.
    """
    return ridge_basis(written, RIDGE**2, RIDGE * FLOOR)


class ProjectionState(NamedTuple):
    """The wrapped optimizer's state, and the number of updates so far."""

    inner: Any
    done: Array


def project_orthogonal(
    inner: optax.GradientTransformation,
    plan: Plan,
    settings: Orthogonality,
    scales_of: Callable[[PyTree], Scales] = lambda base: NO_SCALES,
) -> optax.GradientTransformationExtraArgs:
    """Wrap a whole optimizer: the update's outcome for S has nothing left in the span of LoRA's updated B.

    u' = u − (p + u) VᵀV for each bundle of directions p, V an orthonormal basis of that span; Adam's first moment m of
    it becomes m − m VᵀV, or it would lead back. Where the basis is empty (B = 0, a layer without LoRA) no bit changes.
    It stands around the whole optimizer because it must see LoRA's new B. The trees that it is used on are
    `jaxsteer.optim.Params` with None in frozen leaves; where LoRA is among the frozen ones, or has constants, the
    update is given them: tx.update(grads, state, params, frozen=frozen).

    Args:
        inner: the whole optimizer. plan, settings: as for `joint_overlap`.
        scales_of: base tree -> factors behind what LoRA writes, see `Scales`; the base is then given as `frozen` too.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> ProjectionState:
        return ProjectionState(inner.init(params), jnp.zeros((), jnp.int32))

    def project(updates: PyTree, state: Any, params: PyTree, frozen: PyTree) -> tuple[PyTree, Any]:
        new: Steering = optax.apply_updates(params, updates).steering
        if frozen is not None:
            new = _merged(new, frozen.steering)
        layers = joint_layers(plan, new, settings)
        scales = scales_of(params.base if frozen is None else _merged(params.base, frozen.base))
        basis = write_basis(_gather(_writers(plan, settings), new, layers, scales))
        steering, moments = updates.steering, state
        for part in _steered(plan, settings):
            update = part.leaf(steering)
            if update is None:  # a frozen slot stays as it is
                continue
            own = _at(part.layers(new), basis, layers)
            apart = update - part.within(part.leaf(new), own)
            steering = with_leaf(steering, (part.slot.name, part.site, part.name), apart)
            moments = _without_moment(moments, part, own)
        return updates._replace(steering=steering), moments

    def update(
        updates: PyTree, state: ProjectionState, params: PyTree | None = None, *, frozen: PyTree = None, **extra: Any
    ) -> tuple[PyTree, ProjectionState]:
        if params is None:
            raise ValueError("project_orthogonal needs the parameters: tx.update(grads, state, params)")
        updates, inner_state = inner.update(updates, state.inner, params, frozen=frozen, **extra)
        done = state.done + 1
        due = done % settings.every == 0
        updates, inner_state = jax.lax.cond(
            due, lambda u, s: project(u, s, params, frozen), lambda u, s: (u, s), updates, inner_state
        )
        return updates, ProjectionState(inner_state, done)

    return optax.GradientTransformationExtraArgs(init, update)


def _merged(trained: PyTree, frozen: PyTree) -> PyTree:
    """The whole of a tree whose leaves are None where the other has them."""
    return jax.tree.map(lambda a, b: b if a is None else a, trained, frozen, is_leaf=lambda leaf: leaf is None)


def _without_moment(state: Any, part: Bundle, basis: Array) -> Any:
    """Take the span of a basis out of one leaf's first moments (`mu`), wherever in an optimizer's state they are."""
    place = ["mu", "steering", part.slot.name, part.site, part.name]

    def visit(path: tuple, leaf: Array) -> Array:
        names = [getattr(key, "name", getattr(key, "key", None)) for key in path]
        return leaf - part.within(leaf, basis) if names[-5:] == place else leaf

    return jax.tree_util.tree_map_with_path(visit, state)
