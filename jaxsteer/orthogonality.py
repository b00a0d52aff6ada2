"""Joint adaptation: weight updates and steering in one plan, kept out of each other's subspaces.

Per layer, B [D, R] collects the directions that LoRA writes to the residual stream and S [r, D] those that steering
reads from it (or writes to it). With the ridge projector P = B (BᵀB + εI)⁻¹ Bᵀ, ε = 1e-6 · tr(BᵀB)/R + 1e-12, their
overlap is Ω = tr(S P Sᵀ) / ‖S‖², 0 where they share nothing and 1 where S lies in the span of B; R/D is chance.
The penalty is tr(S P Sᵀ) (or Ω) in the loss; the projection takes the span of B out of S after an update.
arXiv 2603.00425, joint adaptation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxsteer.types import Array, Plan, PyTree, Slot, Steering

STEERED = ("block", "attn", "mlp")
"""Sites whose vectors live in the residual stream."""
WRITERS = ("mlp.down", "attn.o")
"""Projections that write to the residual stream."""
RIDGE, FLOOR = 1e-6, 1e-12
HIGHEST = jax.lax.Precision.HIGHEST


@dataclass(frozen=True)
class Orthogonality:
    """How LoRA and steering of one plan are kept apart."""

    mode: Literal["auto", "none", "penalty", "projection"] = "auto"
    """penalty: a term in the loss; projection: LoRA's directions are taken out of the steering after an update; auto:
    the penalty where the plan holds both LoRA and steering of the residual stream, else none."""
    strength: float = 1.0
    """Factor on the penalty, summed over the layers."""
    normalised: bool = True
    """The penalty is Ω itself, whatever the steering's size; False: tr(S P Sᵀ)."""
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
        steered = [part for part in _bundles(plan, self.side) if part.site in STEERED]
        if self.mode == "auto" and not (lora and steered):
            return Orthogonality("none", sites=self.sites)
        if not steered:
            raise ValueError(
                f"orthogonality.mode {self.mode}: no slot {self.side} directions of the residual stream; steer "
                f"{', '.join(STEERED)} by a low-rank method, or set orthogonality.mode to none"
            )
        if not any(site in self.sites for slot in lora for site in slot.sites):
            have = sorted({site for slot in lora for site in slot.sites}) or "no LoRA"
            raise ValueError(
                f"orthogonality.mode {self.mode}: no LoRA writes to the residual stream at {', '.join(self.sites)} "
                f"(the plan has {have}); add one of {', '.join(WRITERS)}, or set orthogonality.mode to none"
            )
        return Orthogonality(
            "penalty" if self.mode == "auto" else self.mode,
            self.strength,
            self.normalised,
            self.side,
            self.sites,
            self.through_lora,
            self.every,
        )


class Bundle(NamedTuple):
    """One parameter that is a bundle of directions: its place in the steering pytree and its axis over the width."""

    slot: Slot
    site: str
    name: str
    axis: int

    def rows(self, steering: Steering) -> Array:
        """The directions as rows, [A, r, D]."""
        leaf = steering[self.slot.name][self.site][self.name]
        return _to_rows(leaf, self.axis)


def _to_rows(leaf: Array, axis: int) -> Array:
    rows = jnp.moveaxis(leaf, axis, -1)
    return rows.reshape(rows.shape[0], -1, rows.shape[-1])


def _from_rows(rows: Array, like: Array, axis: int) -> Array:
    return jnp.moveaxis(rows.reshape(jnp.moveaxis(like, axis, -1).shape), -1, axis)


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
    where = lambda parts: {layer for part in parts for layer in _layers(part, steering)}
    return tuple(sorted(where(_steered(plan, settings)) & where(_writers(plan, settings))))


def _layers(part: Bundle, steering: Steering) -> tuple[int, ...]:
    return part.slot.active_layers(steering[part.slot.name][part.site][part.name].shape[0])


def _gather(parts: list[Bundle], steering: Steering, layers: tuple[int, ...]) -> Array:
    """All directions of each of `layers` as rows, [len(layers), r, D]; zero rows where a slot is not active."""
    gathered = []
    for part in parts:
        rows, active = part.rows(steering), _layers(part, steering)
        if active != layers:
            kept = [i for i, layer in enumerate(active) if layer in layers]
            at = [layers.index(active[i]) for i in kept]
            empty = jnp.zeros((len(layers), *rows.shape[1:]), rows.dtype)
            rows = empty.at[jnp.array(at, jnp.int32)].set(rows[jnp.array(kept, jnp.int32)])
        gathered.append(rows)
    return jnp.concatenate(gathered, axis=1)


class Shared(NamedTuple):
    """Per joint layer, fp32 [n]: what lies inside LoRA's span, tr(S P Sᵀ), and the whole, ‖S‖²."""

    inside: Array
    whole: Array


def shared_energy(steered: Array, written: Array) -> Shared:
    """tr(S P Sᵀ) and ‖S‖² for S [n, r, D] and Bᵀ [n, R, D], by R × R solves only."""
    gram = jnp.einsum("nrd,nqd->nrq", written, written, precision=HIGHEST)
    size = gram.shape[-1]
    ridge = RIDGE * jnp.trace(gram, axis1=1, axis2=2) / size + FLOOR
    factor = jnp.linalg.cholesky(gram + ridge[:, None, None] * jnp.eye(size, dtype=gram.dtype)[None])
    cross = jnp.einsum("nrd,nsd->nrs", written, steered, precision=HIGHEST)
    half = jax.lax.linalg.triangular_solve(factor, cross, left_side=True, lower=True)
    return Shared(jnp.sum(half**2, axis=(1, 2)), jnp.sum(steered**2, axis=(1, 2)))


def _shared(plan: Plan, steering: Steering, settings: Orthogonality) -> Shared:
    layers = joint_layers(plan, steering, settings)
    written = _gather(_writers(plan, settings), steering, layers)
    if not settings.through_lora:
        written = jax.lax.stop_gradient(written)
    return shared_energy(_gather(_steered(plan, settings), steering, layers), written)


def overlap(plan: Plan, steering: Steering, settings: Orthogonality = Orthogonality()) -> Array:  # noqa: B008  # frozen
    """Ω of each joint layer (`joint_layers`), fp32 [n] in [0, 1]; [0] where the plan has none."""
    if not joint_layers(plan, steering, settings):
        return jnp.zeros(0, jnp.float32)
    return _ratio(_shared(plan, steering, settings)).astype(jnp.float32)


def _ratio(shared: Shared) -> Array:
    return shared.inside / jnp.maximum(shared.whole, jnp.finfo(shared.whole.dtype).tiny)


def overlap_penalty(
    plan: Plan,
    steering: Steering,
    settings: Orthogonality = Orthogonality("penalty"),  # noqa: B008  # frozen
) -> Array:
    """strength · Σ over the layers of Ω, or of tr(S P Sᵀ) where not normalised; 0 unless the mode is penalty."""
    if settings.mode != "penalty":
        return jnp.zeros((), jnp.float32)
    shared = _shared(plan, steering, settings)
    terms = _ratio(shared) if settings.normalised else shared.inside
    return settings.strength * jnp.sum(terms).astype(jnp.float32)


def write_basis(written: Array) -> Array:
    """An orthonormal basis of the span of rows [n, R, D] -> rows V [n, R, D], zero rows beyond the rank.

    The rank is that which the overlap sees: a direction counts from a singular value of 1e-6 ‖B‖ (and √FLOOR · 1e-3)
    on; the ridge weight of one below is under R · 1e-6. With all rows zero the basis is empty.
    """
    q, r = jnp.linalg.qr(written.swapaxes(-1, -2))  # [n, D, R], [n, R, R]
    left, singular, _ = jnp.linalg.svd(r)
    energy = jnp.sum(singular**2, axis=-1, keepdims=True)
    seen = singular**2 > RIDGE**2 * energy + RIDGE * FLOOR
    basis = jnp.einsum("ndr,nrs->nsd", q, left, precision=HIGHEST)
    return jnp.where(seen[..., None], basis, 0)


def take_out(rows: Array, basis: Array) -> Array:
    """S (I − VᵀV) for rows S [n, r, D] and an orthonormal basis V [n, R, D]."""
    inside = jnp.einsum("nrd,nsd->nrs", rows, basis, precision=HIGHEST)
    return rows - jnp.einsum("nrs,nsd->nrd", inside, basis, precision=HIGHEST)


class ProjectionState(NamedTuple):
    """The wrapped optimizer's state, and the number of updates so far."""

    inner: Any
    count: Array


def project_orthogonal(
    inner: optax.GradientTransformation, plan: Plan, settings: Orthogonality
) -> optax.GradientTransformationExtraArgs:
    """Wrap a whole optimizer: the update's outcome for S has nothing left in the span of LoRA's updated B.

    u' = (p + u)(I − VVᵀ) − p for each bundle of directions p, and Adam's first moment of it loses the same part, or it
    would lead back. It stands around the whole optimizer because it must see LoRA's new B. The trees that it is used on
    are `jaxsteer.optim.Params` with None in frozen leaves; where LoRA is among the frozen ones, or has constants, the
    update is given them: tx.update(grads, state, params, frozen=frozen).
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> ProjectionState:
        return ProjectionState(inner.init(params), jnp.zeros((), jnp.int32))

    def project(updates: PyTree, state: Any, params: PyTree, frozen: PyTree) -> tuple[PyTree, Any]:
        new: Steering = optax.apply_updates(params, updates).steering  # type: ignore[attr-defined]
        if frozen is not None:
            pick = lambda a, b: b if a is None else a
            new = jax.tree.map(pick, new, frozen.steering, is_leaf=lambda leaf: leaf is None)
        layers = joint_layers(plan, new, settings)
        basis = write_basis(_gather(_writers(plan, settings), new, layers))
        steering, moments = updates.steering, state
        for part in _steered(plan, settings):
            if steering[part.slot.name][part.site][part.name] is None:  # a frozen slot stays as it is
                continue
            active = _layers(part, new)
            own = jnp.zeros((len(active), *basis.shape[1:]), basis.dtype)  # an empty basis where LoRA is not active
            kept = [i for i, layer in enumerate(active) if layer in layers]
            own = own.at[jnp.array(kept, jnp.int32)].set(
                basis[jnp.array([layers.index(active[i]) for i in kept], jnp.int32)]
            )

            def outside(leaf: Array, own: Array = own, axis: int = part.axis) -> Array:
                return _from_rows(take_out(_to_rows(leaf, axis), own), leaf, axis)

            before = params.steering[part.slot.name][part.site][part.name]
            after = outside(new[part.slot.name][part.site][part.name])
            steering = _replaced(steering, part, after - before)
            moments = _map_moment(moments, part, outside)
        return updates._replace(steering=steering), moments

    def update(
        updates: PyTree, state: ProjectionState, params: PyTree | None = None, *, frozen: PyTree = None, **extra: Any
    ) -> tuple[PyTree, ProjectionState]:
        if params is None:
            raise ValueError("project_orthogonal needs the parameters: tx.update(grads, state, params)")
        updates, inner_state = inner.update(updates, state.inner, params, frozen=frozen, **extra)
        count = state.count + 1
        due = count % settings.every == 0
        updates, inner_state = jax.lax.cond(
            due, lambda u, s: project(u, s, params, frozen), lambda u, s: (u, s), updates, inner_state
        )
        return updates, ProjectionState(inner_state, count)

    return optax.GradientTransformationExtraArgs(init, update)


def _replaced(steering: Steering, part: Bundle, leaf: Array) -> Steering:
    slot = steering[part.slot.name]
    site = slot[part.site] | {part.name: leaf}
    return steering | {part.slot.name: slot | {part.site: site}}


def _map_moment(state: Any, part: Bundle, change: Callable[[Array], Array]) -> Any:
    """Change the first moments (`mu`) of one leaf, wherever in an optimizer's state they are."""
    place = ["steering", part.slot.name, part.site, part.name]

    def visit(path: tuple, leaf: Array) -> Array:
        names = [getattr(key, "name", getattr(key, "key", None)) for key in path]
        return change(leaf) if "mu" in names and names[-4:] == place else leaf

    return jax.tree_util.tree_map_with_path(visit, state)
