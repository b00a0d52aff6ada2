"""The settings of a run that learns from rewards of its own answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, get_args

from jaxsteer.objectives import Grpo, Objective
from jaxsteer.objectives.grpo import Average, Scale
from jaxsteer.optim import OptimConfig
from jaxsteer.ranges import Count, Inside, Natural, NonNegative, Positive, Range, check_ranges
from train.config.run import TrainConfig, changeable, operational


@dataclass(frozen=True)
class PolicyLoss:
    """How rewards become a loss. The defaults are DAPO's; GRPO's are clip-high 0.2, beta 0.04, average answers."""

    clip_low: Inside = 0.2
    """How far the probability of a token may fall below the one it was sampled with, as a share, with --updates."""
    clip_high: Positive = 0.28
    """How far it may rise above it."""
    beta: NonNegative = 0.0
    """Weight of the KL to the reference: the steering that the run starts from, on the pretrained base. 0: none."""
    average: Average = "tokens"
    """What the loss is averaged over: all tokens alike, answers (a token of a long answer counts less), or a constant
    (Dr. GRPO)."""
    scale: Scale = "std"
    """What the advantages of a group are divided by: the standard deviation of its rewards, or nothing (Dr. GRPO)."""

    def __post_init__(self) -> None:
        """Reject settings that no loss has."""
        if self.scale not in get_args(Scale):
            raise ValueError(f"--policy.scale {self.scale!r}: use {', '.join(get_args(Scale))}")
        check_ranges(self, "--policy.")
        self.objective(1, 1.0, on_policy=True)

    def objective(self, max_tokens: int, temperature: float, *, on_policy: bool) -> Grpo:
        """The loss as a function."""
        clips = (self.clip_low, self.clip_high)
        return Grpo(
            *clips, self.beta, self.average, max_tokens=max_tokens, on_policy=on_policy, temperature=temperature
        )


@dataclass(frozen=True)
class GrpoConfig(TrainConfig):
    """A run that learns from rewards of its own answers."""

    program: ClassVar[str] = "grpo"

    rewards: tuple[str, ...] = ("exact",)
    """What answers are rewarded for, added up: exact (the right answer by the task's rule), number, label, format (the
    rule finds an answer), or FILE.py:FUNCTION, a function (example, answer) -> number; each with a factor if wanted,
    0.2*format."""
    prompts: Count = 16
    """Prompts that are answered for each batch of rollouts."""
    group: Annotated[int, Range(2)] = 8
    """Answers to each prompt, which are compared with each other; at least 2."""
    temperature: Positive = 1.0
    """Temperature at which answers are sampled, and of the policy that is trained."""
    updates: Count = 1
    """Updates of the parameters for each batch of rollouts. Steps, checkpoints and evaluations are multiples of it."""
    keep_truncated: bool = True
    """Learn from answers that reached the maximum number of tokens; else they are left out of the loss."""
    policy: PolicyLoss = PolicyLoss()  # frozen
    """The loss."""
    share_prompts: bool = True
    """Compute the prompt of a group once for all its answers, where the attention kernel can."""
    show_rollouts: Natural = operational(10)
    """Batches of rollouts between two that are shown, with the KL to the reference; 0: none."""
    batch_size: Count = 8
    """Rows computed at a time; a batch of rollouts takes as many times as its answers need."""
    optim: OptimConfig = changeable(OptimConfig(lr=1e-3, schedule="constant", warmup=0.05))
    """Optimizer: learning rates, schedules, clipping."""
    out: str = operational("runs/grpo")
    """Folder for the run: config, metrics, checkpoints, steering file, plots."""

    def __post_init__(self) -> None:
        """Reject settings that no run could have."""
        super().__post_init__()
        if self.grad_accumulation != 1:
            raise ValueError(
                f"--grad-accumulation {self.grad_accumulation}: rollouts are divided into microbatches of --batch-size "
                "rows anyway; leave it out"
            )
        for name in ("steps", "checkpoint_every", "evaluate_every"):
            if (getattr(self, name) or 0) % self.updates:
                option = "--" + name.replace("_", "-")
                raise ValueError(f"{option} must be a multiple of --updates {self.updates}, got {getattr(self, name)}")

    @property
    def loss(self) -> Objective:
        """What a step minimises."""
        return self.policy.objective(self.task.max_new_tokens + 1, self.temperature, on_policy=self.updates == 1)
