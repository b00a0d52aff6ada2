"""How fast training data is ready, how much memory it takes, and what a batch of it costs.

Run it twice: the first run tokenises, the second finds what the first has written.
"""

from __future__ import annotations

import json
import random
import re
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np

from jaxsteer.io import cache_folder
from jaxsteer.io.files import replacing
from jaxsteer.ranges import Count, check_ranges
from train.base_models import describe
from train.data import DataSource, Encoding
from train.data.text_files import json_lines
from train.data.tokenised import tokenised
from train.run.training import tokenising
from train.tasks import HubTask

_DIGIT = re.compile(r"[0-9]")


@dataclass(frozen=True)
class DataBench:
    """Time to the first batch, memory, padding, and time per batch of data of any size."""

    data: str
    """JSON Lines file with the columns of a named task."""
    task: str = "gsm8k"
    """The named task that reads it."""
    examples: Count | None = None
    """Number of examples: write a file of this many lines first, which repeats the given one with other digits. By
    default the file as it is."""
    folder: str = "."
    """Where such a file is written; one that is there is used again."""
    model: str = "smollm2-135m-instruct"
    """Base model whose tokenizer is used."""
    batch_size: Count = 64
    """Rows per batch."""
    sequence_length: Count = 1024
    """Tokens per row; longer examples are dropped."""
    batches: Count = 100
    """Number of batches that are timed, from all over the first pass."""
    json: str | None = None
    """File to write the figures to."""

    def __post_init__(self) -> None:
        """Reject settings that nothing can be measured with."""
        check_ranges(self)


def bench_data(config: DataBench) -> dict[str, float]:
    """Prepare the data as a run does, and time its batches."""
    task = HubTask(config.task, train=str(_grown(config)), on_empty="drop")
    tokenizer = describe(config.model, "float32").require_tokenizer()
    encoding = Encoding(max_length=config.sequence_length, on_long="drop")
    figures = dict[str, float]()

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        figures[name] = time.perf_counter() - began

    before = _memory()
    with timed("start, s"):
        with timed("tokens, s"):
            store, report = tokenised(task.recipe("train"), tokenizer, encoding, cache_folder() / "tokens", tokenising)
        with timed("layout, s"):
            source = DataSource(store, config.batch_size, config.sequence_length)
        with timed("first batch, s"):
            source.batch(0)
        with timed("digest, s"):
            store.digest()
    steps = np.random.default_rng(0).permutation(source.steps(1) - 1)[: config.batches]
    seconds, busy = [], []
    for step in steps.tolist():
        began, working = time.perf_counter(), time.thread_time()
        source.batch(step)
        seconds.append(time.perf_counter() - began)
        busy.append(time.thread_time() - working)
    after = _memory()
    return figures | {
        "batch, ms": 1000 * statistics.median(seconds),
        "batch, ms of a core": 1000 * statistics.median(busy),
        "examples": report.kept,
        "tokens": report.tokens,
        "tokens that are not padding, %": 100 * source.fill,
        **{f"memory, {name}, MB": after[name] - before[name] for name in after},
    }


def _grown(config: DataBench) -> Path:
    """The file to use, which is written if a number of examples is asked for."""
    if config.examples is None:
        return Path(config.data)
    path = Path(config.folder) / f"{Path(config.data).stem}-{config.examples}.jsonl"
    if not path.exists():
        draw = random.Random(0)
        rows = [row for _, row in json_lines(config.data)]
        with replacing(path) as file:
            for row in islice(cycle(rows), config.examples):
                file.write(json.dumps({name: _varied(value, draw) for name, value in row.items()}).encode() + b"\n")
    return path


def _varied(value: object, draw: random.Random) -> object:
    """A text with other digits."""
    return _DIGIT.sub(lambda _: str(draw.randrange(1, 10)), value) if isinstance(value, str) else value


def _memory() -> dict[str, float]:
    """Resident memory of this process in MB: its own, and pages of files; {} where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return {}
    sizes = dict(line.split(":", 1) for line in lines)
    kinds = {"own": "RssAnon", "of files": "RssFile"}
    return {name: int(sizes[key].split()[0]) / 1000 for name, key in kinds.items() if key in sizes}
