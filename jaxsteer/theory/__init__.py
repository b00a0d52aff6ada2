"""Weight updates as activation shifts, on any model: pure functions that compose with JAX's transformations.

Studies of real fine-tunings, with files, figures and tables, are in `train.theory`.
"""

from jaxsteer.models.transformer import Network
from jaxsteer.theory.compare import (
    Comparison,
    Means,
    Totals,
    compare_networks,
    kl_divergence,
    kl_from_base,
    means,
    measure,
    totals,
)
from jaxsteer.theory.conversion import Converted, FitSettings, to_lora, to_steering
from jaxsteer.theory.curvature import (
    dense,
    empirical_fisher_product,
    gauss_newton_product,
    hessian_product,
    per_example_gradients,
)
from jaxsteer.theory.distillation import Distilled, distill
from jaxsteer.theory.fits import Factor, Fit, absorb, empty, fit, fit_nonlinear, gains, mean_shift, unexplained
from jaxsteer.theory.geometry import (
    captured,
    directions_for,
    effective_rank,
    map_directions,
    method_directions,
    principal_angles,
    subspace_overlap,
    top_directions,
)
from jaxsteer.theory.mlp import (
    adapter_shift,
    down_shift,
    gate_shift,
    gated_mlp,
    mlp_shift,
    pre_mlp_shift,
    up_shift,
)
from jaxsteer.theory.oracle import oracle_steering, replayed
from jaxsteer.theory.predict import Promise, aligned_start, gradient_factors, promise, site_gradients
from jaxsteer.theory.shares import Shares, examples_of, share_intervals, site_shares
from jaxsteer.theory.shifts import Remainders, energy, explained, first_order, higher_order, reach, remainders, shift
from jaxsteer.theory.tangent import tangent_forward, tangent_logits, tangent_loss
from jaxsteer.theory.update import difference, merged, only_layer, written

__all__ = [
    "Comparison",
    "Converted",
    "Distilled",
    "Factor",
    "Fit",
    "FitSettings",
    "Means",
    "Network",
    "Promise",
    "Remainders",
    "Shares",
    "Totals",
    "absorb",
    "adapter_shift",
    "aligned_start",
    "captured",
    "compare_networks",
    "dense",
    "difference",
    "directions_for",
    "distill",
    "down_shift",
    "effective_rank",
    "empirical_fisher_product",
    "empty",
    "energy",
    "examples_of",
    "explained",
    "first_order",
    "fit",
    "fit_nonlinear",
    "gains",
    "gate_shift",
    "gated_mlp",
    "gauss_newton_product",
    "gradient_factors",
    "hessian_product",
    "higher_order",
    "kl_divergence",
    "kl_from_base",
    "map_directions",
    "mean_shift",
    "means",
    "measure",
    "merged",
    "method_directions",
    "mlp_shift",
    "only_layer",
    "oracle_steering",
    "per_example_gradients",
    "pre_mlp_shift",
    "principal_angles",
    "promise",
    "reach",
    "remainders",
    "replayed",
    "share_intervals",
    "shift",
    "site_gradients",
    "site_shares",
    "subspace_overlap",
    "tangent_forward",
    "tangent_logits",
    "tangent_loss",
    "to_lora",
    "to_steering",
    "top_directions",
    "totals",
    "unexplained",
    "up_shift",
    "written",
]
