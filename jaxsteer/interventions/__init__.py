"""Interventions, one file per method; each is a function at a site, y' = y + Δ(params; x, y)."""

from jaxsteer.interventions.fixed import Fixed
from jaxsteer.interventions.linear import Linear
from jaxsteer.interventions.lora import LoRA
from jaxsteer.interventions.nonlinear import Nonlinear
from jaxsteer.types import Intervention

METHODS: dict[str, type[Intervention]] = {
    "fixed": Fixed,
    "linear": Linear,
    "nonlinear": Nonlinear,
    "lora": LoRA,
}
"""Every method by the name that plans, configs and files use."""

__all__ = ["METHODS", "Fixed", "Linear", "LoRA", "Nonlinear"]
