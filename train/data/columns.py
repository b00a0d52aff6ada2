"""Tokenised examples as flat arrays, in memory or in the mapped pages of a file.

A token's completion flag and its weight are the same over long stretches, so an example keeps them by runs: lengths of
neighbouring tokens that agree in both. A prompt with its completion has two.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from train.data.examples import DIGEST_BYTES, RUN, Run, TokenizedExample, digest_of_row

SHOWN = 5
"""Number of files that are named, at most."""


class Row(NamedTuple):
    """One encoded example, before it is written into columns.

    ids            int32 [n]
    runs           cover the ids; neighbours differ
    prompt_length  number of tokens before the first completion token; n if there is none
    source         of the example
    answer         its gold answer
    notes          what the report counts, as bits
    """

    ids: np.ndarray
    runs: list[Run]
    prompt_length: int
    source: str
    answer: str | None
    notes: int


@dataclass(frozen=True, eq=False)
class Columns:
    """Examples one after another. The arrays may be read-only views of a mapped file.

    ids             uint16 or int32 [tokens]
    starts          int32 [n + 1], where each example begins in `ids`
    runs            RUN [runs]
    run_starts      int32 [n + 1], where each example begins in `runs`
    prompt_lengths  int32 [n]
    notes           uint8 [n], bits
    digests         uint8 [n, DIGEST_BYTES], see `digest_of_row`
    sources         n texts
    answers         n texts or None
    """

    ids: np.ndarray
    starts: np.ndarray
    runs: np.ndarray
    run_starts: np.ndarray
    prompt_lengths: np.ndarray
    notes: np.ndarray
    digests: np.ndarray
    sources: Sequence[str]
    answers: Sequence[str | None]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Columns:
        """The columns of encoded examples, in memory."""
        runs = np.array([run for row in rows for run in row.runs], RUN)
        run_starts = _starts(len(row.runs) for row in rows)
        digests = b"".join(
            digest_of_row(row.ids, runs[a:b])
            for row, a, b in zip(rows, run_starts[:-1].tolist(), run_starts[1:].tolist(), strict=True)
        )
        return cls(
            np.concatenate([np.empty(0, np.int32), *(row.ids for row in rows)]),
            _starts(len(row.ids) for row in rows),
            runs,
            run_starts,
            np.array([row.prompt_length for row in rows], np.int32),
            np.array([row.notes for row in rows], np.uint8),
            np.frombuffer(digests, np.uint8).reshape(-1, DIGEST_BYTES),
            [row.source for row in rows],
            [row.answer for row in rows],
        )

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.prompt_lengths)

    def views(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids and the runs of one example, not copied."""
        starts, run_starts = self.starts, self.run_starts
        return self.ids[starts[row] : starts[row + 1]], self.runs[run_starts[row] : run_starts[row + 1]]

    def example(self, row: int, prefix: str = "") -> TokenizedExample:
        """One example as arrays of its own; `prefix` is put before its source."""
        ids, runs = self.views(row)
        completion, weights = spread(runs)
        return TokenizedExample(
            ids.astype(np.int32),
            completion,
            int(self.prompt_lengths[row]),
            prefix + self.sources[row],
            self.answers[row],
            weights,
        )

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int32 [n]."""
        return np.diff(self.starts)

    @property
    def supervised(self) -> np.ndarray:
        """Number of tokens of each example whose weight is not 0, int32 [n]."""
        counted = np.append(0, np.cumsum(self.runs["length"] * (self.runs["weight"] != 0)))
        return np.diff(counted[self.run_starts]).astype(np.int32)

    @cached_property
    def files(self) -> list[str]:
        """The files (or data sets) that the examples come from, in order; the first few."""
        return files_of(self.sources)


def spread(runs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Completion flags, bool, and weights, fp32, of the tokens that runs cover."""
    lengths = runs["length"]
    return np.repeat(runs["completion"] != 0, lengths), np.repeat(runs["weight"], lengths)


def files_of(sources: Iterable[str]) -> list[str]:
    """The files (or data sets) of sources, "file:line", without their line numbers; the first few."""
    found: dict[str, None] = {}
    for source in sources:
        found[source.rpartition(":")[0] or source] = None
        if len(found) == SHOWN:
            break
    return list(found)


def _starts(lengths: Iterable[int]) -> np.ndarray:
    return np.append(0, np.cumsum(np.fromiter(lengths, np.int64))).astype(np.int32)
