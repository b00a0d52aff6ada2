"""Weight updates as activation shifts, measured on any model: pure functions that compose with grad, jvp, vjp, vmap, jit."""

from jaxsteer.theory.gated_mlp import adapter_shift, down_shift, gate_shift, gated_mlp, mlp_shift, pre_mlp_shift, up_shift
from jaxsteer.theory.shifts import Remainders, energy, explained, first_order, higher_order, reach, remainders, shift
from jaxsteer.theory.update import difference, merged

__all__ = [
    "Remainders",
    "adapter_shift",
    "difference",
    "down_shift",
    "energy",
    "explained",
    "first_order",
    "gate_shift",
    "gated_mlp",
    "higher_order",
    "merged",
    "mlp_shift",
    "pre_mlp_shift",
    "reach",
    "remainders",
    "shift",
    "up_shift",
]
