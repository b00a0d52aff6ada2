"""The settings of a run that learns from preferences."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal, get_args

from jaxsteer.objectives import Kto, Objective, Preference
from jaxsteer.optim import OptimConfig
from jaxsteer.ranges import Finite, NonNegative, Positive, Range, check_ranges
from train.config.run import TrainConfig, changeable, operational
from train.tasks import PairedTask, Task

Kind = Literal["sigmoid", "ipo", "simpo", "kto"]
"""sigmoid is DPO."""

_BETA: dict[Kind, float] = {"sigmoid": 0.1, "ipo": 0.1, "simpo": 2.0, "kto": 0.1}


@dataclass(frozen=True)
class PreferenceLoss:
    """How preferences become a loss."""

    kind: Kind = "sigmoid"
    """sigmoid: DPO. ipo: squared distance of the margin from 1 / (2 beta). simpo: mean log-probabilities and no
    reference. kto: answers judged one by one, without pairs."""
    beta: Positive | None = None
    """How strongly the model is held near the reference: small values let it move far. Default: 0.1, simpo 2."""
    label_smoothing: Annotated[float, Range(0, 0.5, open_high=True)] = 0.0
    """Share of the pairs that are taken to be the wrong way round, 0 to below 0.5 (conservative DPO); sigmoid only."""
    margin: Finite = 0.0
    """Least difference of the scaled log-probabilities that is aimed at; simpo only, where 1 is usual."""
    bidirectional: bool = False
    """Train the steering for both signs of its strength, so that -1 does the opposite (BiPO); sigmoid only, and for
    plans of activation methods only."""
    desirable_weight: NonNegative = 1.0
    """Weight of desirable answers; kto only."""
    undesirable_weight: NonNegative = 1.0
    """Weight of undesirable answers; kto only."""

    def __post_init__(self) -> None:
        """Reject settings without effect, and values that no loss has."""
        if self.kind not in get_args(Kind):
            raise ValueError(f"--preference.kind {self.kind!r}: use {', '.join(get_args(Kind))}")
        check_ranges(self, "--preference.")
        own = {
            "label_smoothing": "sigmoid",
            "bidirectional": "sigmoid",
            "margin": "simpo",
            "desirable_weight": "kto",
            "undesirable_weight": "kto",
        }
        for name, kind in own.items():
            if getattr(self, name) != getattr(type(self), name) and self.kind != kind:
                raise ValueError(f"--preference.{name.replace('_', '-')} is for --preference.kind {kind} only")

    @property
    def needs_reference(self) -> bool:
        """Whether log-probabilities of the reference are needed."""
        return self.kind != "simpo"

    @property
    def scale(self) -> float:
        """The value of beta."""
        return _BETA[self.kind] if self.beta is None else self.beta

    @property
    def objective(self) -> Objective:
        """The loss as a function."""
        beta = self.scale
        if self.kind == "kto":
            return Kto(beta, self.desirable_weight, self.undesirable_weight)
        return Preference(
            self.kind,
            beta=beta,
            label_smoothing=self.label_smoothing,
            margin=self.margin,
            bidirectional=self.bidirectional,
        )


@dataclass(frozen=True)
class DpoConfig(TrainConfig):
    """A run that learns from preferences."""

    program: ClassVar[str] = "dpo"

    task: Task = field(default_factory=PairedTask)
    """Pairs of answers, or judged answers: your own (preference), or right and wrong answers to a task (paired)."""
    preference: PreferenceLoss = PreferenceLoss()  # frozen
    """The loss."""
    share_prompts: bool = True
    """Compute the prompt of a pair once for both answers, where the attention kernel can."""
    optim: OptimConfig = changeable(OptimConfig(lr=5e-4, schedule="cosine", warmup=0.1))
    """Optimizer: learning rates, schedules, clipping."""
    out: str = operational("runs/dpo")
    """Folder for the run: config, metrics, checkpoints, steering file, plots."""

    @property
    def loss(self) -> Objective:
        """What a step minimises."""
        return self.preference.objective
