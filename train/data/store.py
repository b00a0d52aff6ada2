"""The training examples of a run: which of the tokenised ones, in which order, and how long at most."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxsteer.batches import Flat
from train.data.columns import SHOWN, Columns, Row, spread
from train.data.encoding import Encoding, OnLong, Report, too_long_text
from train.data.examples import RUN, TokenizedExample


@dataclass(frozen=True, eq=False)
class TokenStore(Sequence[TokenizedExample]):
    """Tokenised examples chosen from columns; an example becomes an object of its own only when it is asked for.

    An example longer than the limit loses as many tokens as it must, after the first `begins`.

    columns   where the examples are
    prefixes  for each of these, what its sources begin with
    chosen    int [n], numbers of the examples in all columns together; may repeat
    limit     maximum number of tokens; None for no limit
    begins    number of tokens with which the tokenizer begins every text; they are never cut
    """

    columns: Sequence[Columns]
    prefixes: Sequence[str]
    chosen: np.ndarray
    limit: int | None = None
    begins: int = 0
    lengths: np.ndarray = field(init=False, repr=False)
    """Tokens of each example, int32 [n]."""
    _ends: np.ndarray = field(init=False, repr=False)
    _long: np.ndarray = field(init=False, repr=False)  # numbers of the examples that are cut

    def __post_init__(self) -> None:
        """Find where the columns end, and the lengths."""
        object.__setattr__(self, "_ends", np.cumsum([len(part) for part in self.columns]))
        lengths = self.take(lambda part: part.lengths)
        long = np.empty(0, int) if self.limit is None else np.flatnonzero(lengths > self.limit)
        object.__setattr__(self, "_long", long)
        object.__setattr__(self, "lengths", lengths if self.limit is None else np.minimum(lengths, self.limit))

    @classmethod
    def whole(cls, columns: Sequence[Columns]) -> TokenStore:
        """All examples of some columns, in order."""
        return cls(columns, [""] * len(columns), np.arange(sum(map(len, columns)), dtype=np.int32))

    @classmethod
    def of(cls, examples: Sequence[TokenizedExample]) -> TokenStore:
        """Examples as a store; one that is a store already is returned."""
        if isinstance(examples, TokenStore):
            return examples
        rows = [Row(each.ids, each.runs(), each.prompt_length, each.source, each.answer, 0) for each in examples]
        return cls.whole([Columns.of(rows)])

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.chosen)

    def __getitem__(self, number: Any) -> Any:  # as a Sequence's: a number or a slice
        """An example; for a slice, a list of them."""
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        part, row = map(int, self._at(self.chosen[number]))
        example = self.columns[part].example(row, self.prefixes[part])
        over = 0 if self.limit is None else len(example) - self.limit
        return example.without(slice(self.begins, self.begins + over)) if over > 0 else example

    def source(self, number: int) -> str:
        """Where an example comes from."""
        part, row = map(int, self._at(self.chosen[number]))
        return self.prefixes[part] + self.columns[part].sources[row]

    @property
    def files(self) -> list[str]:
        """The files (or data sets) that the examples come from; the first few."""
        found: dict[str, None] = {}
        for prefix, part in zip(self.prefixes, self.columns, strict=True):
            found |= dict.fromkeys(prefix + file for file in part.files)
            if len(found) >= SHOWN:
                break
        return list(found)[:SHOWN]

    def take(self, column: Callable[[Columns], np.ndarray]) -> np.ndarray:
        """What `column` gives for each example of the columns, [..., ...], for those of the store."""
        return np.concatenate([column(part) for part in self.columns])[self.chosen]

    def digest(self) -> str:
        """sha256, in hexadecimal, of all that the loss and the steering see: `digest_of`, without making examples."""
        digests = self.take(lambda part: part.digests)
        for number in self._long:
            digests[number] = np.frombuffer(self[number].digest(), np.uint8)
        return hashlib.sha256(digests.tobytes()).hexdigest()

    def supervised(self) -> int:
        """Number of tokens whose weight in the loss is not 0."""
        counts = self.take(lambda part: part.supervised)
        for number in self._long:
            counts[number] = np.count_nonzero(self[number].weights)
        return int(counts.sum(dtype=np.int64))

    def flat(self, numbers: np.ndarray) -> Flat:
        """Examples one after another, int [m], copied from the columns."""
        if not len(numbers) or (len(self._long) and np.isin(numbers, self._long).any()):
            return Flat.of([self[number] for number in numbers])
        parts, rows = self._at(self.chosen[numbers])
        places = [(self.columns[part], row) for part, row in zip(parts.tolist(), rows.tolist(), strict=True)]
        ids, runs = zip(*(part.views(row) for part, row in places), strict=True)
        return Flat(
            self.lengths[numbers],
            np.array([part.prompt_lengths[row] for part, row in places], np.int32),
            np.concatenate(ids, dtype=np.int32),
            *spread(np.concatenate(runs, dtype=RUN, casting="no")),
        )

    def _at(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(in which columns, in which row of them) some of the numbers chosen are."""
        parts = np.searchsorted(self._ends, numbers, side="right")
        return parts, numbers - np.append(0, self._ends)[parts]


def within(store: TokenStore, encoding: Encoding, begins: int) -> tuple[TokenStore, Report]:
    """The examples that a maximum length leaves, and statistics of all.

    Args:
        store: the examples, of any length.
        encoding: its `max_length` and `on_long` say what happens to longer ones.
        begins: number of tokens with which the tokenizer begins every text.

    Raises:
        ValueError: an example is too long and may not be dropped; or none is left.
    """
    limit, lengths = encoding.max_length, store.lengths
    over = lengths - (lengths.max() if limit is None else limit)
    # A prompt keeps its beginning and at least one token. Only plain examples are cut.
    cuttable = encoding.on_long == "cut"
    cut = (over > 0) & cuttable & (store.take(lambda part: part.prompt_lengths) - begins > over)
    dropped = (over > 0) & ~cut
    named = lambda which: tuple((store.source(i), int(lengths[i])) for i in np.flatnonzero(which).tolist())
    kept = TokenStore(store.columns, store.prefixes, store.chosen[~dropped], limit, begins)
    notes = store.take(lambda part: part.notes)
    report = Report(
        len(store),
        int(kept.lengths.sum(dtype=np.int64)),
        kept.supervised(),
        int(lengths.max()),
        limit,
        named(dropped),
        named(cut),
        *(int(np.count_nonzero(notes & bit)) for bit in (1, 2, 4)),
    )
    check_kept(report, encoding.on_long)
    return kept, report


def check_kept(report: Report, on_long: OnLong) -> None:
    """Raise ValueError for examples that are too long and may not be dropped, or if none is left."""
    long = too_long_text(report, report.too_long)
    if report.too_long and on_long == "error":
        raise ValueError(f"{long}; raise --sequence-length, shorten them, or drop them with --on-long drop")
    if report.too_long and on_long == "cut":
        raise ValueError(
            f"{long}, and cutting the prompt is not enough; raise --sequence-length, or use --on-long drop"
        )
    if not report.kept:
        raise ValueError(f"no example is left: {long}; raise --sequence-length")
