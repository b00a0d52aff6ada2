"""What a fit check asks: one compiled step of one run, on one topology."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from jaxsteer.models.config import ModelConfig
from train.config import TrainConfig
from train.plan.topology import Topology

Which = Literal["train", "decode"]
"""A compiled step: the training step, or decoding one batch of prompts."""


@dataclass(frozen=True)
class Question:
    """Does this compiled step of a run fit on these chips, and how fast can it be?

    which          the compiled step
    config         the run
    model_config   the run's base model
    topology       the chips
    prompt_length  tokens per prompt; only decoding uses it
    """

    which: Which
    config: TrainConfig
    model_config: ModelConfig
    topology: Topology
    prompt_length: int = 0

    def with_config(self, config: TrainConfig) -> Question:
        """The same question about a run with other settings."""
        return replace(self, config=config)

    @property
    def microbatch(self) -> int:
        """Rows of one microbatch, over all chips."""
        return self.config.batch_size // self.config.grad_accumulation
