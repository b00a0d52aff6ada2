"""What all rows share: settings, model, data, and how the peer is reached."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxsteer.io import LoadedModel, save_hf
from jaxsteer.ranges import Count, check_ranges
from train.base_models import load
from train.bench.against.texts import KINDS, Data, read_texts
from train.data import Encoding, TokenizedExample, encode, encode_prompts
from train.peers import Conversation, converse

EXAMPLES = 2_000
"""Examples of a file that are encoded: more than any row uses."""

LOSS_TOLERANCE, NORM_TOLERANCE = 1e-4, 1e-3
"""How far losses may differ between the sides, in nats, and gradient norms, relative: rounding of fp32 sums."""

MARGIN = 1e-3
"""Logits of the two best tokens that are nearer than this can be ranked by rounding."""


@dataclass(frozen=True)
class AgainstBench:
    """Compare speed and memory with transformers and peft on the same work, in turns, in one run.

    Each finished row is saved in the JSON file at once; rows that it has, with the same settings and code, are not
    measured again.
    """

    peer_python: str | None = None
    """Python with torch, transformers and peft; by default that of .peers/hf, which `make peers` makes in a clone."""
    rows: tuple[str, ...] = ()
    """Names of rows, or of their groups: training, dense, decoding, evaluation, memory, start; by default all."""
    pairs: Count = 5
    """Number of rounds of both sides."""
    steps: Count = 3
    """Training steps of ours in a round; the opponent trains on the same examples."""
    model: str = "smollm2-135m-instruct"
    """Local folder, .gguf file or Hugging Face id of a Llama, or smollm2-135m-instruct."""
    data: str | None = None
    """JSONL file of word problems such as GSM8K's; by default made up, with similar lengths."""
    boolq: str | None = None
    """JSONL file of questions such as BoolQ's; by default made up, with similar lengths."""
    batch_size: Count = 8
    """Rows of a training batch."""
    sequence_length: Count = 256
    """Tokens of a row; longer examples are left out on both sides."""
    new_tokens: Count = 50
    """Tokens generated after each prompt; nothing ends an answer early."""
    questions: Count = 96
    """Questions of the set that is evaluated."""
    json: str = "against.json"
    """File of the figures."""
    again: bool = False
    """Measure rows again that the file has."""
    table: str | None = None
    """Measure nothing; print the Markdown table of this file."""
    into: str | None = None
    """With --table: write the table into this page, between the lines that mark its place."""

    def __post_init__(self) -> None:
        """Reject settings that nothing could be measured with."""
        check_ranges(self)
        if self.into and not self.table:
            raise ValueError("--into names the page for a table: give the file of the figures too, with --table")

    @property
    def python(self) -> Path | None:
        """The peer's interpreter; None = that of its environment."""
        return Path(self.peer_python) if self.peer_python else None

    @property
    def defining(self) -> dict[str, Any]:
        """The settings that a figure depends on."""
        names = ("pairs", "steps", "model", "batch_size", "sequence_length", "new_tokens", "questions")
        return {name: getattr(self, name) for name in names}


class Launch(NamedTuple):
    """How the processes of both sides are started.

    folder  Hugging Face folder of the model, fp32
    python  the peer's interpreter; None = that of its environment
    """

    folder: Path
    python: Path | None


@dataclass(frozen=True, eq=False)
class Arena:
    """What all rows share.

    config  settings
    loaded  the model, fp32
    launch  how processes are started
    data    by kind, "gsm8k" and "boolq"
    told    what the peer said of its packages, by name
    """

    config: AgainstBench
    loaded: LoadedModel
    launch: Launch
    data: Mapping[str, Data]
    told: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def peer(self) -> Iterator[Conversation]:
        """A fresh process of the peer that has loaded the model."""
        with converse("bench", self.launch.python) as peer:
            said = peer.ask("load", model=str(self.launch.folder), threads=os.cpu_count())
            self.told.update(said["versions"])
            yield peer

    def training_examples(self, kind: str) -> list[TokenizedExample]:
        """Examples that fit a row; "dense": random tokens that fill it, all of them targets."""
        config = self.config
        if kind == "dense":
            shape = (config.batch_size * config.steps, config.sequence_length)
            tokens = np.random.default_rng(0).integers(0, self.loaded.config.vocab_size, shape).astype(np.int32)
            return [TokenizedExample(ids, np.ones(len(ids), bool), 1, "dense") for ids in tokens]
        encoding = Encoding(max_length=config.sequence_length, on_long="drop")
        return encode(self.data[kind].examples()[:EXAMPLES], self.loaded.require_tokenizer(), encoding)[0]

    def prompts(self, count: int) -> list[TokenizedExample]:
        """The first word problems, without their answers.

        Raises:
            ValueError: there are fewer.
        """
        data = self.data["gsm8k"]
        if len(data.texts) < count:
            raise ValueError(f"{data.origin}: {len(data.texts)} questions, but {count} are to be answered")
        return encode_prompts(data.examples()[:count], self.loaded.require_tokenizer())[0]


def read_data(config: AgainstBench) -> dict[str, Data]:
    """Examples by kind: of the files, or made up.

    Raises:
        ValueError: a file that cannot be read, see `read_texts`.
    """
    files = {"gsm8k": config.data, "boolq": config.boolq}
    return {kind: make() if (path := files[kind]) is None else read_texts(path) for kind, make in KINDS.items()}


def make_arena(config: AgainstBench, data: Mapping[str, Data], temporary: Path) -> Arena:
    """Load the model, and write the peer's copy of it into a temporary folder."""
    loaded = load(config.model, "float32")
    folder = temporary / "model"
    save_hf(folder, loaded.config, loaded.base, loaded.family, loaded.require_tokenizer(), generation=loaded.generation)
    return Arena(config, loaded, Launch(folder, config.python), data)
