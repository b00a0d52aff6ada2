"""The strength of steering: y' = y + s · Δ for any method, a factor outside of it and not an edit of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxsteer.types import Array, Context, Plan, PyTree


def check_strength(
    plan: Plan, strength: Mapping[str, ArrayLike] | None, shape: tuple[int, ...] = ()
) -> dict[str, Array]:
    """The strength of each slot as an fp32 array; {} for None.

    Raises:
        ValueError: a slot that the plan does not have, or a shape that is not a beginning of `shape`, [B, T].
    """
    if strength is not None and not isinstance(strength, Mapping):
        raise ValueError(f"strength: give a factor for each slot by name, such as {{'lora': 0.5}}; got {strength!r}")
    factors = {name: jnp.asarray(value, jnp.float32) for name, value in (strength or {}).items()}
    if unknown := sorted(set(factors) - {slot.name for slot in plan}):
        raise ValueError(f"strength: no slot {unknown}; the plan has {[slot.name for slot in plan]}")
    for name, factor in factors.items():
        if factor.shape != shape[: factor.ndim]:
            raise ValueError(
                f"strength of {name!r}: shape {list(factor.shape)}; use a scalar"
                + (f", or one for each row or token: {[list(shape[:1]), list(shape)]}" if shape else "")
            )
    return factors


def at_strength(apply: Callable, factor: Array | None) -> Callable:
    """A method's `apply` whose shift is multiplied by a factor [], [B] or [B, T]; without one, `apply` itself."""
    if factor is None:
        return apply

    def scaled(p: PyTree, x: Array, y: Array, context: Context) -> Array:
        s = factor.astype(y.dtype).reshape(factor.shape + (1,) * (y.ndim - factor.ndim))
        # By itself, as without a strength: fused with what follows, its last product and sum would round differently.
        out = jax.lax.optimization_barrier(apply(p, x, y, context))
        return interpolate(y, out, s)

    return scaled


@jax.custom_jvp
def interpolate(y: Array, out: Array, s: Array) -> Array:
    """y + s · (out − y), and exactly y at s = 0 and `out` at s = 1; s has as many axes as y, or none."""
    return jnp.where(s == 0, y, jnp.where(s == 1, out, y + s * (out - y)))


@interpolate.defjvp
def _interpolate_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    """The derivative of the formula: that of the selection would not depend on s at 0 and 1."""
    (y, out, s), (y_dot, out_dot, s_dot) = primals, tangents
    return interpolate(y, out, s), interpolate(y_dot, out_dot, s) + s_dot * (out - y)
