"""Joint adaptation: weight updates and steering in one plan, kept out of each other's subspaces (arXiv 2603.00425).

For each layer, the columns of B [D, R] are the directions that LoRA writes to the residual stream (after the norm that
some families have there), and the rows of S [r, D] those that steering reads from it, or writes to it. With the ridge
projector P = B (BᵀB + εI)⁻¹ Bᵀ, ε = 1e-6 · tr(BᵀB)/R + 1e-12, their overlap is Ω = tr(S P Sᵀ) / ‖S‖²: 0 if they are
orthogonal, 1 if S is in the span of B, R/D for random directions. The penalty adds tr(S P Sᵀ), or Ω, to the loss; the
projection removes the span of B from S after an update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxsteer.params import Params, combine
from jaxsteer.ranges import Count, Positive, check_ranges
from jaxsteer.steering import with_leaf
from jaxsteer.types import Array, Plan, PyTree, Slot, Steering

STEERED = ("block", "attn", "mlp")
"""Sites whose vectors live in the residual stream."""
WRITERS = ("mlp.down", "attn.o")
"""Projections that write to the residual stream."""
RIDGE, FLOOR = 1e-6, 1e-12
"""ε = RIDGE · tr(BᵀB)/R + FLOOR. FLOOR is also the minimum of Ω's denominator, so that S = 0 has Ω = 0."""
Scales = Mapping[str, Array]
"""Writing projection -> scale [L, D] of the norm after it, which turns B into diag(g) B."""
NO_SCALES: Scales = {}
HIGHEST = jax.lax.Precision.HIGHEST


@dataclass(frozen=True)
class Orthogonality:
    """How the LoRA and the steering of one plan are kept apart."""

    mode: Literal["auto", "none", "penalty", "projection"] = "auto"
    """penalty: add a term to the loss; projection: remove LoRA's directions from the steering after each update; auto:
    penalty if the plan has both LoRA and steering of the residual stream, otherwise none."""
    strength: Positive = 3.0
    """Weight of the penalty, which is summed over layers."""
    normalised: bool = False
    """Penalise the overlap Ω, which ignores the steering's norm, instead of tr(S P Sᵀ)."""
    side: Literal["reads", "writes", "both"] = "reads"
    """Steering directions to keep orthogonal to LoRA's: those it reads (D), those it writes (U), or both."""
    sites: tuple[str, ...] = ("mlp.down",)
    """Projections whose LoRA is considered: mlp.down, attn.o, or both."""
    through_lora: bool = False
    """Let the penalty's gradient reach LoRA too. It grows as 1/‖B‖ near B = 0."""
    every: Count = 1
    """Number of updates between projections."""

    def __post_init__(self) -> None:
        """Reject invalid settings."""
        if self.mode not in ("auto", "none", "penalty", "projection"):
            raise ValueError(f"orthogonality.mode must be auto, none, penalty or projection; got {self.mode!r}")
        if self.side not in ("reads", "writes", "both"):
            raise ValueError(f"orthogonality.side must be reads, writes or both; got {self.side!r}")
        if not self.sites or not set(self.sites) <= set(WRITERS):
            raise ValueError(
                f"orthogonality.sites must be one or more of {', '.join(WRITERS)}; got {self.sites or 'none'}"
            )
        check_ranges(self, "orthogonality.")

    def resolve(self, plan: Plan) -> Orthogonality:
        """Replace `auto` by the mode that it means for a plan, and check that the plan has something to constrain.

        Raises:
            ValueError: a constraint applies (as set, or by `auto`), but the plan has no steering of the residual
                stream, no LoRA that writes to it, or no layer with both.
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
                f"add low-rank steering at {', '.join(STEERED)}, or set orthogonality.mode to none"
            )
        if not writers:
            have = ", ".join(sorted({site for slot in lora for site in slot.sites})) or "no site"
            raise ValueError(
                f"orthogonality.mode {self.mode}: no LoRA writes to the residual stream at {', '.join(self.sites)} "
                f"(the plan has LoRA at {have}); add one of {', '.join(WRITERS)}, or set orthogonality.mode to none"
            )
        if not any(a.slot.shares_layer(b.slot) for a in steered for b in writers):
            raise ValueError(
                f"orthogonality.mode {self.mode}: LoRA at {', '.join(self.sites)} and steering share no layer; "
                "put both in at least one layer, or set orthogonality.mode to none"
            )
        return replace(self, mode="penalty") if self.mode == "auto" else self


class Bundle(NamedTuple):
    """One parameter that is a bundle of directions: its path in the steering tree and its axis over the width."""

    slot: Slot
    site: str
    name: str
    axis: int

    @property
    def path(self) -> tuple[str, str, str]:
        """(slot, site, parameter), as in the steering tree."""
        return self.slot.name, self.site, self.name

    def leaf(self, steering: Steering) -> Array:
        """The parameter."""
        return steering[self.slot.name][self.site][self.name]

    def layers(self, steering: Steering) -> tuple[int, ...]:
        """The layers in which it has directions."""
        return self.slot.active_layers(self.leaf(steering).shape[0])

    def to_rows(self, leaf: Array) -> Array:
        """The directions of a leaf in the parameter's layout as rows [A, r, D]."""
        rows = jnp.moveaxis(leaf, self.axis, -1)
        return rows.reshape(rows.shape[0], -1, rows.shape[-1])

    def from_rows(self, rows: Array, like: Array) -> Array:
        """Undo `to_rows`."""
        return jnp.moveaxis(rows.reshape(jnp.moveaxis(like, self.axis, -1).shape), -1, self.axis)

    def within(self, leaf: Array, basis: Array) -> Array:
        """S VᵀV in the parameter's layout: the part of its directions in the span of orthonormal rows V [A, R, D]."""
        weights = jnp.einsum("nrd,nsd->nrs", self.to_rows(leaf), basis, precision=HIGHEST)
        return self.from_rows(jnp.einsum("nrs,nsd->nrd", weights, basis, precision=HIGHEST), leaf)


def _bundles(plan: Plan, side: str) -> Iterator[Bundle]:
    """The directions of the plan's activation methods, each parameter once."""
    for slot in plan:
        if slot.method.kind == "activation":
            reads = slot.method.reads if side in ("reads", "both") else ()
            writes = slot.method.writes if side in ("writes", "both") else ()
            for site in slot.sites:
                for name, axis in dict.fromkeys((*reads, *writes)):
                    yield Bundle(slot, site, name, axis)


def _steered(plan: Plan, settings: Orthogonality) -> list[Bundle]:
    return [bundle for bundle in _bundles(plan, settings.side) if bundle.site in STEERED]


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
    """The layers that have both LoRA and steering, ascending."""
    layers_of = lambda bundles: {layer for bundle in bundles for layer in bundle.layers(steering)}
    return tuple(sorted(layers_of(_steered(plan, settings)) & layers_of(_writers(plan, settings))))


def _gather(bundles: list[Bundle], steering: Steering, layers: tuple[int, ...], scales: Scales = NO_SCALES) -> Array:
    """All directions in each of `layers` as rows, [len(layers), r, D]; zero rows where a slot is not active."""

    def rows_of(bundle: Bundle) -> Array:
        rows, active = bundle.to_rows(bundle.leaf(steering)), bundle.layers(steering)
        if bundle.site in scales:
            rows = rows * scales[bundle.site][jnp.array(active, jnp.int32), None].astype(rows.dtype)
        return _move_layers(rows, active, layers)

    return jnp.concatenate([rows_of(bundle) for bundle in bundles], axis=1)


def _move_layers(rows: Array, source: tuple[int, ...], target: tuple[int, ...]) -> Array:
    """Rows [len(source), r, D] of the source layers, laid out for the target layers; zeros for layers without."""
    if source == target:
        return rows
    common = [layer for layer in source if layer in target]
    index_in = lambda layers: jnp.array([layers.index(layer) for layer in common], jnp.int32)
    return jnp.zeros((len(target), *rows.shape[1:]), rows.dtype).at[index_in(target)].set(rows[index_in(source)])


class Shared(NamedTuple):
    """For each joint layer [n]: the steering's energy inside LoRA's span, tr(S P Sᵀ), and in total, ‖S‖²."""

    inside: Array
    whole: Array


def ridge_basis(written: Array, ridge: float, floor: float) -> Array:
    """V with VᵀV = B (BᵀB + εI)⁻¹ Bᵀ, ε = ridge · tr(BᵀB)/R + floor; V = 0 at B = 0.

    Vᵀ is the upper part of an orthonormal basis of the columns of [B; √ε I], whose Gram matrix is BᵀB + εI. The Gram
    matrix itself is never formed: in fp32, rounding would swamp ε, and linearly dependent columns of B give NaN.

    Args:
        written: Bᵀ [n, R, D].
        ridge: relative regularisation.
        floor: absolute regularisation.

    Returns:
        V [n, R, D].
    """
    size, width = written.shape[-2:]
    epsilon = ridge / size * jnp.sum(written**2, axis=(1, 2)) + floor
    lower = jnp.sqrt(epsilon)[:, None, None] * jnp.eye(size, dtype=written.dtype)[None]
    basis, _ = jnp.linalg.qr(jnp.concatenate([written.swapaxes(1, 2), lower], axis=1))
    return basis[:, :width].swapaxes(1, 2)


def shared_energy(steered: Array, written: Array) -> Shared:
    """tr(S P Sᵀ) = ‖S Vᵀ‖² and ‖S‖², with P = VᵀV for the ridge basis V of B.

    Args:
        steered: S [n, r, D].
        written: Bᵀ [n, R, D].
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
    """The overlap Ω = tr(S P Sᵀ) / ‖S‖² of LoRA and steering, layer by layer.

    Args:
        plan: the steering plan.
        steering: its complete tree.
        settings: which directions and projections are compared.
        scales: scales of the norms after the writing projections, see `Scales`.

    Returns:
        fp32 [n] in [0, 1], one for each of `joint_layers`; empty if there are none.
    """
    if not joint_layers(plan, steering, settings):
        return jnp.zeros(0, jnp.float32)
    return _ratio(_shared(plan, steering, settings, scales)).astype(jnp.float32)


def _ratio(shared: Shared) -> Array:
    return shared.inside / jnp.maximum(shared.whole, FLOOR)


def chance_overlap(plan: Plan, steering: Steering, settings: Orthogonality = Orthogonality()) -> float:
    """R/D, the expected overlap of random directions with LoRA's span; 0 if no layer has both."""
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
    """strength · Σ over layers of tr(S P Sᵀ), or of Ω if `normalised`. Arguments as for `joint_overlap`.

    Returns:
        Scalar fp32; 0 unless the mode is penalty.
    """
    if settings.mode != "penalty":
        return jnp.zeros((), jnp.float32)
    shared = _shared(plan, steering, settings, scales)
    terms = _ratio(shared) if settings.normalised else shared.inside
    return settings.strength * jnp.sum(terms).astype(jnp.float32)


def write_basis(written: Array) -> Array:
    """Rows V [n, R, D] whose VᵀV projects onto the span of the rows Bᵀ [n, R, D], to the precision of the overlap.

    Its ridge ε' is the overlap's ε times 1e-6. S − S VᵀV keeps the share ε'/(σ² + ε') of a direction with singular
    value σ, of which the overlap counts σ²/(σ² + ε): at most ε'/4ε remains.
    """
    return ridge_basis(written, RIDGE**2, RIDGE * FLOOR)


class ProjectionState(NamedTuple):
    """The wrapped optimizer's state, and the number of updates done, int32 []."""

    inner: optax.OptState
    done: Array


def project_orthogonal(
    inner: optax.GradientTransformation,
    plan: Plan,
    settings: Orthogonality,
    scales_of: Callable[[PyTree], Scales] = lambda base: NO_SCALES,
) -> optax.GradientTransformationExtraArgs:
    """Wrap an optimizer so that after each update S has no component in the span of LoRA's updated B.

    For directions p with update u, u' = u − (p + u) VᵀV, where V is an orthonormal basis of that span. Adam's first
    moment m becomes m − m VᵀV, so that momentum does not lead back. Where V is empty (B = 0, or a layer without LoRA),
    not a bit changes. The wrapper goes around the complete optimizer because it needs LoRA's new B.

    Gradients and parameters are `jaxsteer.params.Params` with None for frozen leaves. If LoRA is frozen or has
    constants, pass the frozen leaves too: `tx.update(grads, state, params, frozen=frozen)`.

    Args:
        inner: the complete optimizer.
        plan: the steering plan.
        settings: as for `joint_overlap`; `every` is the number of updates per projection.
        scales_of: base tree -> scales of the norms after the writing projections, see `Scales`. It is given the
            complete base tree, so a frozen base must be in `frozen`.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: Params) -> ProjectionState:
        return ProjectionState(inner.init(params), jnp.zeros((), jnp.int32))

    def update(
        updates: Params,
        state: ProjectionState,
        params: Params | None = None,
        *,
        frozen: Params | None = None,
        **extra: Any,
    ) -> tuple[Params, ProjectionState]:
        if params is None:
            raise ValueError("project_orthogonal needs the parameters: tx.update(grads, state, params)")
        updates, inner_state = inner.update(updates, state.inner, params, frozen=frozen, **extra)
        done = state.done + 1
        updates, inner_state = jax.lax.cond(
            done % settings.every == 0,
            lambda u, s: _project(plan, settings, scales_of, u, s, params, frozen),
            lambda u, s: (u, s),
            updates,
            inner_state,
        )
        return updates, ProjectionState(inner_state, done)

    return optax.GradientTransformationExtraArgs(init, update)


def _project(
    plan: Plan,
    settings: Orthogonality,
    scales_of: Callable[[PyTree], Scales],
    updates: Params,
    state: optax.OptState,
    params: Params,
    frozen: Params | None,
) -> tuple[Params, optax.OptState]:
    """Updates and an optimizer's state without what leads into the span of LoRA's updated B."""
    whole = params._replace(steering=optax.apply_updates(params.steering, updates.steering))
    if frozen is not None:
        whole = combine(whole, frozen)
    new = whole.steering
    layers = joint_layers(plan, new, settings)
    basis = write_basis(_gather(_writers(plan, settings), new, layers, scales_of(whole.base)))
    basis_for = lambda bundle: _move_layers(basis, layers, bundle.layers(new))
    trained = [bundle for bundle in _steered(plan, settings) if bundle.leaf(updates.steering) is not None]
    steering = updates.steering
    for bundle in trained:
        shared = bundle.within(bundle.leaf(new), basis_for(bundle))
        steering = with_leaf(steering, bundle.path, bundle.leaf(steering) - shared)

    def without_span(moment: Params) -> Params:
        rest = moment.steering
        for bundle in trained:
            leaf = bundle.leaf(rest)
            if not isinstance(leaf, optax.MaskedNode):  # the leaf belongs to another group's moments
                rest = with_leaf(rest, bundle.path, leaf - bundle.within(leaf, basis_for(bundle)))
        return moment._replace(steering=rest)

    return updates._replace(steering=steering), _map_first_moments(without_span, state)


def _map_first_moments(change: Callable[[Params], Params], state: optax.OptState) -> optax.OptState:
    """Apply `change` to every first moment of Adam in an optimizer's state, however chained, wrapped or partitioned."""
    is_params = lambda path, value: isinstance(value, Params)  # not a slot or a parameter that is named mu
    for path, moment in optax.tree.get_all_with_path(state, "mu", is_params):
        state = optax.tree.set(state, lambda at, value, path=path: at == path, mu=change(moment))
    return state
