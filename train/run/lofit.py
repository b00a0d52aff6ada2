"""LoFiT, which takes two trainings, as a function over anything that can carry out one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

import jax.numpy as jnp

from jaxsteer.interventions import strongest_heads
from jaxsteer.models.config import ModelConfig
from jaxsteer.params import Params
from jaxsteer.types import Steering
from train.config import TrainConfig


class HasParams(Protocol):
    """The result of a training."""

    @property
    def params(self) -> Params:
        """The trained trees."""
        ...


R = TypeVar("R", bound=HasParams)
Fit = Callable[[str, TrainConfig, Sequence[Steering] | None], Sequence[R]]
"""(name of the stage, config, initial steering) -> the results, one for each run that it trains at a time."""


def check_heads(config: ModelConfig, heads: int) -> None:
    """Refuse a number of heads that the second stage cannot select, before the first one trains.

    Raises:
        ValueError: below 1, or more than the model has.
    """
    if not 1 <= heads <= config.layers * config.heads:
        raise ValueError(
            f"LoFiT: cannot select {heads} heads: the model has {config.layers * config.heads} ({config.layers} layers "
            f"with {config.heads} each)"
        )


STAGES = ("scale", "shift")
"""Names of the two trainings, and of their runs' folders."""

SHARE = 0.4
"""Share of the steps for the first stage, if nothing else is asked for."""


def split_steps(steps: int, share: float = SHARE) -> int:
    """Number of the first stage's steps.

    Raises:
        ValueError: a share that leaves a stage without steps.
    """
    first = round(share * steps)
    if not 0 < first < steps:
        raise ValueError(f"LoFiT: a share of {share} of {steps} steps leaves one of its two stages without any")
    return first


def lofit(
    fit: Fit,
    config: TrainConfig,
    steps: int,
    *,
    heads: int,
    share: float = SHARE,
    l1: float = 5e-4,
    ratio: float = 0.5,
) -> Sequence:
    """LoFiT (Yin et al. 2024, arXiv 2406.01563): scale every head, keep the strongest, shift those.

    Args:
        fit: trains one config; called twice.
        config: what both stages have in common; its plan is ignored.
        steps: updates of both stages together, so that the budget equals that of other methods.
        heads: number of heads to shift, K.
        share: share of the steps for the first stage.
        l1: weight of the first stage's L1 penalty.
        ratio: learning rate of the first stage divided by that of the second; the paper uses 5e-3 and 1e-2.

    Returns:
        The results of the second stage.

    Raises:
        ValueError: a share that leaves a stage without steps, or more heads than the model has.
    """
    first = split_steps(steps, share)
    slow = replace(config.optim, lr=ratio * config.optim.lr)
    scale = replace(config, plan=(f"lofit_scale(l1={l1}) @ attn.heads",), steps=first, optim=slow)
    scaled = fit("scale", scale, None)
    initial = []
    for outcome in scaled:
        scales = outcome.params.steering["lofit_scale"]["attn.heads"]["A"]
        initial.append(
            {"lofit": {"attn.heads": {"v": jnp.zeros_like(scales), "selected": strongest_heads(scales, heads)}}}
        )
    return fit("shift", replace(config, plan=("lofit @ attn.heads",), steps=steps - first), initial)
