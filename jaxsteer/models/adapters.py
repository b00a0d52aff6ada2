"""Several adapters in one batch: each token is steered by its own, whatever the others in its row are steered by."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxsteer.models.config import ModelConfig, site_dims
from jaxsteer.types import Array, Context, Intervention, Plan, PyTree, SiteDims, Steering


def check_adapters(
    config: ModelConfig, plan: Plan, steering: Steering, adapters: ArrayLike | None, shape: tuple[int, ...]
) -> Array | None:
    """The index of each token's adapter, int32 of `shape` [B, T]; None for None.

    Raises:
        ValueError: an index of another shape or type, or a steering tree of one adapter.
    """
    if adapters is None:
        return None
    index = jnp.asarray(adapters)
    if index.shape not in (shape[:1], shape) or not jnp.issubdtype(index.dtype, jnp.integer):
        raise ValueError(
            f"adapters: {index.dtype} {list(index.shape)}; give an integer for each row or token, "
            f"{list(shape[:1])} or {list(shape)}"
        )
    for slot in plan:
        for site in slot.sites:
            for name, spec in slot.method.param_specs(site_dims(config, site)).items():
                if steering[slot.name][site][name].ndim != len(spec.shape) + 2:
                    raise ValueError(
                        f"adapters: slot {slot.name!r}, {name} at {site!r} has the shape "
                        f"{list(steering[slot.name][site][name].shape)}, without an axis of adapters; "
                        "jaxsteer.stack_adapters makes one"
                    )
    index = index.astype(jnp.int32)
    return jnp.broadcast_to(index if index.ndim == 2 else index[:, None], shape)


def for_each_token(method: Intervention) -> Callable[[PyTree, Array, Array, Context], Array]:
    """A method's `apply` for parameters of several adapters, with each token's adapter in the context."""
    if method.per_token:
        return method.apply

    def apply(p: PyTree, x: Array, y: Array, context: Context) -> Array:
        specs = method.param_specs(SiteDims(x.shape[2:], y.shape[2:]))
        axes = {name: specs[name].adapter_axis for name in p}
        alone = context._replace(adapter=None)
        every = jax.vmap(lambda p: method.apply(p, x, y, alone), (axes,))(p)
        own = context.own(len(every))
        for i, out in enumerate(every):
            y = jnp.where(own[..., i].reshape(own.shape[:2] + (1,) * (y.ndim - 2)), out, y)
        return y

    return apply
