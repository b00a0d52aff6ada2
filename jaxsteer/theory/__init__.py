"""Weight updates as activation shifts: pure functions that measure, replay and convert them."""

from jaxsteer.theory.compare import Comparison, Means, Totals, compare, means, totals
from jaxsteer.theory.conversion import Converted, Distilled, FitSettings, distill, measure, to_lora, to_steering
from jaxsteer.theory.fits import Factor, Fit, absorb, empty, fit, fit_nonlinear, gains, mean_shift, unexplained
from jaxsteer.theory.geometry import (
    captured,
    directions_for,
    effective_rank,
    map_directions,
    method_directions,
    overlap,
    principal_angles,
    top_directions,
)
from jaxsteer.theory.oracle import Network, oracle, replayed
from jaxsteer.theory.predict import Promise, aligned_start, gradient_factors, promise, site_gradients
from jaxsteer.theory.shares import Shares, examples_of, share_intervals, site_shares

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
    "Shares",
    "Totals",
    "absorb",
    "aligned_start",
    "captured",
    "compare",
    "directions_for",
    "distill",
    "effective_rank",
    "empty",
    "examples_of",
    "fit",
    "fit_nonlinear",
    "gains",
    "gradient_factors",
    "map_directions",
    "mean_shift",
    "means",
    "measure",
    "method_directions",
    "oracle",
    "overlap",
    "principal_angles",
    "promise",
    "replayed",
    "share_intervals",
    "site_gradients",
    "site_shares",
    "to_lora",
    "to_steering",
    "top_directions",
    "totals",
    "unexplained",
]
