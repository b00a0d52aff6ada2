"""Weight updates as activation shifts, on any model: pure functions that compose with JAX's transformations."""

from jaxsteer.theory.curvature import (
    dense,
    empirical_fisher_product,
    gauss_newton_product,
    hessian_product,
    per_example_gradients,
)
from jaxsteer.theory.gated_mlp import (
    adapter_shift,
    down_shift,
    gate_shift,
    gated_mlp,
    mlp_shift,
    pre_mlp_shift,
    up_shift,
)
from jaxsteer.theory.shifts import Remainders, energy, explained, first_order, higher_order, reach, remainders, shift
from jaxsteer.theory.tangent import tangent_forward, tangent_logits, tangent_loss
from jaxsteer.theory.update import difference, merged, only_layer, written

__all__ = [
    "Remainders",
    "adapter_shift",
    "dense",
    "difference",
    "down_shift",
    "empirical_fisher_product",
    "energy",
    "explained",
    "first_order",
    "gate_shift",
    "gated_mlp",
    "gauss_newton_product",
    "hessian_product",
    "higher_order",
    "merged",
    "mlp_shift",
    "only_layer",
    "per_example_gradients",
    "pre_mlp_shift",
    "reach",
    "remainders",
    "shift",
    "tangent_forward",
    "tangent_logits",
    "tangent_loss",
    "up_shift",
    "written",
]
