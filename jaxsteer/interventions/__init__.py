"""Steering and weight-update methods, one file per method; each is a function at a site, y' = y + Δ(params; x, y).

What is the same for all methods (initialisation over layers, selection of tokens, training) is not here.
"""

from jaxsteer.interventions.direft import DiReFT
from jaxsteer.interventions.dora import DoRA
from jaxsteer.interventions.fixed import FixedVector
from jaxsteer.interventions.jola import JoLA
from jaxsteer.interventions.linear import LinearSteering
from jaxsteer.interventions.lofit import LoFiT, LoFiTScale, select_heads, strongest_heads
from jaxsteer.interventions.lora import LoRA
from jaxsteer.interventions.loreft import LoReFT
from jaxsteer.interventions.nonlinear import NonlinearSteering
from jaxsteer.interventions.pissa import PiSSA
from jaxsteer.interventions.rslora import RsLoRA
from jaxsteer.types import Intervention

METHODS: dict[str, type[Intervention]] = {
    "fixed": FixedVector,
    "linear": LinearSteering,
    "nonlinear": NonlinearSteering,
    "loreft": LoReFT,
    "direft": DiReFT,
    "lofit_scale": LoFiTScale,
    "lofit": LoFiT,
    "jola": JoLA,
    "lora": LoRA,
    "rslora": RsLoRA,
    "dora": DoRA,
    "pissa": PiSSA,
}
"""Every method by its name in plans, configs and files."""

__all__ = [
    "METHODS",
    "DiReFT",
    "DoRA",
    "FixedVector",
    "JoLA",
    "LinearSteering",
    "LoFiT",
    "LoFiTScale",
    "LoRA",
    "LoReFT",
    "NonlinearSteering",
    "PiSSA",
    "RsLoRA",
    "select_heads",
    "strongest_heads",
]
