"""Settings of the measurements on an accelerator, and the shapes that they are made at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxsteer.models.config import ModelConfig
from jaxsteer.ranges import Count, Positive, check_ranges
from train.plan.model_configs import KNOWN_CONFIGS

POST_BLOCK = ("nonlinear(rank=8) @ block",)
LORA = ("lora(rank=8) @ projections",)
PLANS = {"post-block": POST_BLOCK, "LoRA": LORA, "joint": (*LORA, *POST_BLOCK)}
"""The plans that are trained, by their names in the table."""


@dataclass(frozen=True)
class Shapes:
    """The sizes that everything is measured at.

    model         trained and decoded, with random weights
    dtype         of its weights
    length        tokens of a row in training
    batches       rows of a training step, the most promising first
    attention     (rows, length) of the batches that the attention kernels are compared on
    decoding      prompts decoded at a time
    prompt        tokens of a prompt
    new_tokens    tokens generated for each
    sweep_model   trained several times at once
    sweep_batch   (rows, length) of each of these runs
    runs          number of these runs
    """

    model: ModelConfig
    dtype: Literal["float32", "bfloat16"]
    length: int
    batches: tuple[int, ...]
    attention: tuple[tuple[int, int], ...]
    decoding: tuple[int, ...]
    prompt: int
    new_tokens: int
    sweep_model: ModelConfig
    sweep_batch: tuple[int, int]
    runs: int


SMOLLM2_135M = ModelConfig(
    vocab_size=49_152,
    width=576,
    layers=30,
    heads=9,
    kv_heads=3,
    head_dim=64,
    mlp_width=1536,
    norm_eps=1e-5,
    rope_theta=100_000.0,
    tied_head=True,
    max_length=8192,
)

FULL = Shapes(
    model=KNOWN_CONFIGS["meta-llama/Llama-3.1-8B"],
    dtype="bfloat16",
    length=2048,
    batches=(4, 2, 1, 8),
    attention=((4, 2048), (1, 8192)),
    decoding=(1, 32, 256),
    prompt=128,
    new_tokens=128,
    sweep_model=SMOLLM2_135M,
    sweep_batch=(8, 640),
    runs=8,
)

_TINY = ModelConfig(
    vocab_size=61, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_width=48, tied_head=True, max_length=64
)

SMALL = Shapes(
    model=_TINY,
    dtype="float32",
    length=32,
    batches=(2, 1),
    attention=((2, 128),),
    decoding=(1, 2),
    prompt=8,
    new_tokens=4,
    sweep_model=_TINY,
    sweep_batch=(2, 32),
    runs=2,
)


@dataclass(frozen=True)
class AcceleratorBench:
    """Measure on an accelerator, in stages: tests, attention, train8b, peft, decode, sweep, memory and budgets.

    Without --stage, all stages run in order. Every row is saved in --json as soon as it is measured, and a row that is
    there already, measured with the same settings, code and kind of device, is left out: give the same command again to
    go on. Running out of memory is a result like any other. --list shows the stages and what is done, --table FILE
    writes what is in --json as Markdown, --small is a rehearsal on any machine.
    """

    stage: str = ""
    """Stages to run, separated by commas; by default all. --list shows their names."""
    time_limit: Positive | None = None
    """Stop before this many seconds have passed; what has been measured is kept, and the next call goes on. No row is
    begun that is not expected to end in time."""
    json: str = "accelerator.json"
    """The file of results: read first, written again after each row."""
    list: bool = False
    """Show the stages, what they need and what is done, and measure nothing."""
    table: str | None = None
    """Write the results as Markdown to this file, and measure nothing."""
    small: bool = False
    """A rehearsal at tiny shapes, on a CPU too. Its figures mean nothing."""
    retry: bool = False
    """Measure the rows again that failed (not those that ran out of memory)."""
    isolate: bool = True
    """Run each row in a process of its own: it gives its memory back, measures its own peak, and can be stopped."""
    steps: Count = 5
    """Number of steps to time in each row; the medians are reported."""
    pairs: Count = 3
    """Number of times that peft and jaxsteer are measured in turn."""
    peer_python: str | None = None
    """The Python that has torch, transformers and peft; by default the one that runs this."""
    model: str | None = None
    """SmolLM2-135M-Instruct as a local folder or .gguf file, for the stage budgets."""
    gsm8k: str | None = None
    """GSM8K for the stage budgets: a folder of {split}.jsonl files, or a path with {split}."""
    boolq: str | None = None
    """BoolQ for the stage budgets, likewise."""
    methods: tuple[str, ...] = ("LoRA", "post-block nonlinear", "joint, penalty")
    """Methods of the stage budgets, by their names in configs/compare_listops.py."""
    seeds: Count = 5
    """Seeds of each method in the stage budgets."""
    runs: str = "runs/accelerator"
    """Folder for the runs of the stage budgets, which go on where they stopped too."""

    def __post_init__(self) -> None:
        """Reject settings that nothing can be measured with."""
        check_ranges(self)

    @property
    def shapes(self) -> Shapes:
        """The sizes to measure at."""
        return SMALL if self.small else FULL
