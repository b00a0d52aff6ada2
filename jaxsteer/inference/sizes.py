"""How many rows and slots an open queue decodes with: a ladder of few sizes, as each of them is compiled."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from jaxsteer.batches import bucket_length
from jaxsteer.inference.rows import Sizes
from jaxsteer.inference.scheduling import Limits

ROW_FACTOR = 4
"""Between two numbers of rows on the ladder. A free row costs as much as a busy one."""
LEVELS = 3
"""Numbers of slots on the ladder."""
SMALLEST_PROMPT = 64
"""Slots for the tokens of a prompt, at the least if the limits have as many."""
SMALLEST_RING = 128
"""Slots for generated tokens of each row, at the least if the limits have as many."""
SHRINK_STEPS = 64
"""Sizes are given up when they have not been needed for this many steps of decoding."""


class Need(NamedTuple):
    """What the pending requests need.

    pending   number of requests
    longest   tokens of the longest prompt
    reported  tokens that have been reported of the longest of the unfinished answers
    left      tokens that any of these answers may still have
    """

    pending: int
    longest: int
    reported: int
    left: int


class Slots(NamedTuple):
    """Slots of each row: for a prompt's tokens, and for generated ones."""

    prompt: int
    ring: int

    def hold(self, other: Slots) -> bool:
        """Whether these are enough for what needs the others."""
        return self.prompt >= other.prompt and self.ring >= other.ring


def slots_of(sizes: Sizes) -> Slots:
    """The slots of each row."""
    return Slots(sizes.prompt, sizes.ring)


@dataclass(frozen=True)
class Ladder:
    """The sizes of an open queue, every number of rows with every number of slots.

    rows   numbers of rows, ascending
    slots  numbers of slots, ascending in both
    stops  stop tokens of a request
    """

    rows: tuple[int, ...]
    slots: tuple[Slots, ...]
    stops: int

    @classmethod
    def of(cls, limits: Limits, shards: int = 1) -> Ladder:
        """The ladder up to these limits, of rows that can be split over the shards."""
        rows, largest = [shards], limits.rows
        while rows[-1] * ROW_FACTOR * 2 <= largest:
            rows.append(rows[-1] * ROW_FACTOR)
        rows = [count for count in rows if count < largest] + [largest]
        slots = [Slots(bucket_length(limits.max_prompt), longest_ring(limits))]
        while len(slots) < LEVELS:
            prompt, ring = slots[0]
            least = max(SMALLEST_RING, limits.chunk)
            fewer = Slots(
                min(prompt, max(SMALLEST_PROMPT, bucket_length(prompt // 4))), min(ring, max(least, ring // 2))
            )
            if fewer == slots[0]:
                break
            slots.insert(0, fewer)
        return cls(tuple(rows), tuple(slots), limits.max_stop_tokens)

    @property
    def smallest(self) -> Sizes:
        """The sizes to start with."""
        return Sizes(self.rows[0], *self.slots[0], self.stops)

    def prompt_slots(self, length: int) -> int:
        """The fewest slots that hold a prompt of this many tokens."""
        return next(slots.prompt for slots in self.slots if slots.prompt >= length)

    def prompts_up_to(self, length: int) -> list[int]:
        """All numbers of slots that prompts of up to this many tokens are given."""
        return [slots.prompt for slots in self.slots if slots.prompt <= self.prompt_slots(length)]

    def fitting(self, need: Sizes) -> Sizes:
        """The smallest sizes that hold what is needed."""
        rows = next((rows for rows in self.rows if rows >= need.rows), self.rows[-1])
        return Sizes(rows, *self.slots[self._level(slots_of(need))], self.stops)

    def _level(self, need: Slots) -> int:
        return next(i for i, slots in enumerate(self.slots) if slots.hold(need))

    def path(self, old: Sizes, new: Sizes) -> list[Sizes]:
        """Sizes from the old to the new ones, which change rows or slots by one rung at a time.

        Few changes are then ever compiled. Slots change while there are fewer rows to copy.
        """
        start, end = self._level(slots_of(old)), self._level(slots_of(new))
        levels = self.slots[start : end + 1] if start <= end else self.slots[end:start][::-1]
        levels = [slots for slots in levels if slots != slots_of(old)]
        counts = [rows for rows in self.rows if old.rows < rows <= new.rows]
        counts += [rows for rows in reversed(self.rows) if new.rows <= rows < old.rows]
        slots_at = lambda rows: [Sizes(rows, *slots, self.stops) for slots in levels]
        rows_at = lambda slots: [Sizes(rows, *slots, self.stops) for rows in counts]
        if new.rows > old.rows:
            return slots_at(old.rows) + rows_at(slots_of(new))
        return rows_at(slots_of(old)) + slots_at(new.rows)

    def tour(self) -> Iterator[Sizes]:
        """All sizes, beginning with the smallest, by every change of one rung in both directions once."""
        gone: set[frozenset[Sizes]] = set()

        def visit(here: Sizes) -> Iterator[Sizes]:
            yield here
            for there in self._neighbours(here):
                if (edge := frozenset((here, there))) not in gone:
                    gone.add(edge)
                    yield from visit(there)
                    yield here

        return visit(self.smallest)

    def _neighbours(self, sizes: Sizes) -> list[Sizes]:
        row, level = self.rows.index(sizes.rows), self._level(slots_of(sizes))
        return [
            *(Sizes(rows, *slots_of(sizes), self.stops) for rows in _beside(self.rows, row)),
            *(Sizes(sizes.rows, *slots, self.stops) for slots in _beside(self.slots, level)),
        ]


Rung = TypeVar("Rung")


def _beside(rungs: Sequence[Rung], at: int) -> list[Rung]:
    return [rungs[i] for i in (at - 1, at + 1) if 0 <= i < len(rungs)]


def longest_ring(limits: Limits) -> int:
    """Slots of a ring that holds any answer: one fewer than its tokens, the last of which is never read."""
    return max(1, limits.max_new_tokens - 1)


class Load:
    """What the last steps of an open queue needed: sizes grow at once, and shrink when less has been enough for long.

    Args:
        ladder: the sizes to choose from.
        limits: of the decoder.
    """

    def __init__(self, ladder: Ladder, limits: Limits) -> None:
        self._ladder, self._limits = ladder, limits
        self._needs: deque[Sizes] = deque(maxlen=max(1, SHRINK_STEPS // limits.chunk))

    def sizes(self, need: Need) -> Sizes:
        """The sizes for the next step, given what it needs."""
        limits = self._limits
        ring = min(longest_ring(limits), need.reported + limits.chunk)
        self._needs.append(Sizes(min(need.pending, limits.rows), need.longest, ring, limits.max_stop_tokens))
        return self._ladder.fitting(Sizes(*map(max, zip(*self._needs, strict=True))))
