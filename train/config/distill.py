"""The settings of a run that learns from a teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxsteer.objectives import Distillation, Objective
from jaxsteer.ranges import Natural, Positive, check_ranges
from train.config.run import TrainConfig, operational


@dataclass(frozen=True)
class Teacher:
    """Who is imitated: the model itself under another prompt, other steering on the same base, or another model."""

    context: str | None = None
    """Text file that the teacher reads before each prompt (without --task.chat)."""
    system: str | None = None
    """System message that the teacher is given (with --task.chat)."""
    shots: Natural = 0
    """Worked examples that the teacher reads before each prompt. They are taken out of the training examples."""
    separator: str = "\n"
    """Text between worked examples, and between them and the prompt (without --task.chat)."""
    steering: str | None = None
    """Steering file, or folder of a run, of the teacher."""
    model: str | None = None
    """Base model of the teacher, with the same tokenizer; by default the student's."""

    def __post_init__(self) -> None:
        """Reject a teacher that is the student, and settings that exclude each other."""
        check_ranges(self, "--teacher.")
        if self.context is not None and self.system is not None:
            raise ValueError("--teacher.context is for plain prompts, --teacher.system for chats; give one of them")

    @property
    def prompted(self) -> bool:
        """Whether the teacher reads more than the student."""
        return bool(self.context is not None or self.system is not None or self.shots)


@dataclass(frozen=True)
class DistillConfig(TrainConfig):
    """A run that learns from a teacher."""

    program: ClassVar[str] = "distill"

    teacher: Teacher = Teacher(shots=8)  # frozen
    """Who is imitated."""
    temperature: Positive = 1.0
    """Temperature of both distributions; above 1, unlikely tokens count more."""
    out: str = operational("runs/distill")
    """Folder for the run: config, metrics, checkpoints, steering file, plots."""

    def __post_init__(self) -> None:
        """Reject settings that no run could have."""
        super().__post_init__()
        teacher = self.teacher
        if not (teacher.prompted or teacher.steering is not None or teacher.model is not None):
            raise ValueError(
                "jaxsteer distill: the teacher would be the student itself. Give it more to read (--teacher.shots, "
                "--teacher.context, --teacher.system), other steering (--teacher.steering) or another model "
                "(--teacher.model)"
            )
        if teacher.system is not None and not self.task.chat:
            raise ValueError("--teacher.system needs --task.chat; use --teacher.context for plain prompts")
        if teacher.context is not None and self.task.chat:
            raise ValueError("--teacher.context is for plain prompts; with --task.chat use --teacher.system")
        if self.loss_on != "completion":
            raise ValueError(f"--loss-on {self.loss_on}: the teacher reads other prompts; only completions are learned")

    @property
    def loss(self) -> Objective:
        """What a step minimises."""
        return Distillation(self.temperature)
