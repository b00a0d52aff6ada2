"""What every study does: measure, write the numbers, draw the figures, print a table."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rich.table import Table

from jaxsteer.io.files import write_json
from jaxsteer.models.transformer import Network
from jaxsteer.ranges import Count, check_ranges
from jaxsteer.types import Batch
from train.display.console import Bar, get_console, progress
from train.tasks import Split
from train.theory.subjects import Base, read_base, read_tuned

Data = dict[str, Any]
"""What a study measures, as JSON can hold it."""
Row = Mapping[str, str]
"""One row of a table: the text of each column by its heading."""


@dataclass(frozen=True, kw_only=True)
class Study(ABC):
    """A measurement of what fine-tuning does to a model; figures and table are functions of the measured data alone."""

    name: ClassVar[str]
    """Name of the study on the command line, and of its JSON file."""
    title: ClassVar[str]
    """Title of the table."""

    config: str = "configs/theory.py"
    """Config file of the fine-tuning; names the base model and the task."""
    batch_size: Count = 8
    """Rows per batch."""
    out: str
    """Output folder."""

    def __post_init__(self) -> None:
        """Reject settings that nothing can be measured with."""
        check_ranges(self)

    @abstractmethod
    def measure(self) -> Data:
        """Measure.

        Raises:
            ValueError: invalid settings, a fine-tuning that does not exist or belongs to another model.
        """

    @abstractmethod
    def draw(self, data: Data, folder: Path) -> None:
        """Write the figures into an existing folder."""

    @abstractmethod
    def rows(self, data: Data) -> Sequence[Row]:
        """Rows of the table; all have the same columns."""

    def run(self) -> None:
        """Measure, write NAME.json, draw the figures and print the table. Raises as `measure`."""
        data, folder = self.measure(), Path(self.out)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{self.name}.json", data)
        self.draw(data, folder)
        rows = self.rows(data)
        table = Table(*rows[0], title=self.title, title_justify="left")
        for row in rows:
            table.add_row(*row.values())
        get_console().print(table)
        print(f"figures and {self.name}.json: {folder}")


@dataclass(frozen=True, kw_only=True)
class PairStudy(Study):
    """A study of one fine-tuned model beside its base, on test examples."""

    tuned: str = "runs/theory/lora/steering.safetensors"
    """The fine-tuning: a steering file (*.safetensors), or the folder of a fully fine-tuned model."""
    examples: Count = 120
    """Number of test examples to measure on."""
    sequence_length: Count = 96
    """Tokens per row; several examples share one."""

    splits: ClassVar[tuple[Split, ...]] = ("test",)
    """What is read of the task."""

    @property
    def compared(self) -> list[str]:
        """The fine-tunings that are read."""
        return [self.tuned]

    def read(self) -> tuple[Base, Network]:
        """The base model with its task, and the fine-tuned model."""
        base = read_base(self.config, self.compared, splits=self.splits)
        return base, read_tuned(self.tuned, base)

    def test_batches(self, base: Base) -> list[Batch]:
        """The test examples, each once."""
        return base.batches("test", self.examples, batch_size=self.batch_size, sequence_length=self.sequence_length)


class Ticker:
    """Counts finished units of work on a progress bar; can be the callback of a function that reports each of them."""

    def __init__(self, bar: Bar) -> None:
        self._bar, self._done = bar, 0

    def __call__(self, *_: Any, count: int = 1) -> None:
        """Count one unit of work or several. Positional arguments, which callbacks get, are ignored."""
        self._done += count
        self._bar.update(self._done)

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self._bar.note(text)


@contextmanager
def ticking(total: int, description: str) -> Iterator[Ticker]:
    """Show a progress bar over `total` units of work while the block runs."""
    with progress(total, description) as bar:
        yield Ticker(bar)
