"""rsLoRA: LoRA with a scale that keeps learning stable as the rank grows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from jaxsteer.interventions.lora import LoRA


@dataclass(frozen=True)
class RsLoRA(LoRA):
    """y' = y + s · B A x with s = alpha / √rank (Kalajdzievski 2023, arXiv 2312.03732; PEFT's use_rslora)."""

    @property
    def scale(self) -> float:
        """The scale s of the update."""
        return self.alpha / self.rank**0.5

    def resized(self, rank: int, scale: float) -> Self:
        """The method with another rank and scale."""
        return replace(self, rank=rank, alpha=scale * rank**0.5)
