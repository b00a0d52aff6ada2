"""How a queue is drained: with the sizes that the submitted requests need, compiled when they are first used."""

from __future__ import annotations

from collections.abc import Sequence

from jaxsteer.batches import bucket_length
from jaxsteer.inference.layouts import PrefillLayout, half_of, next_prefill, repeated
from jaxsteer.inference.rows import Sizes
from jaxsteer.inference.scheduling import Limits
from jaxsteer.inference.sizes import Need, longest_ring
from jaxsteer.inference.table import Ticket

FIRST_RING = 128
"""Slots for generated tokens of each row to start with, doubled as answers reach them."""
RESIZE_SHARE = 4
"""Slots for prompts are given up once they are 1 / RESIZE_SHARE of all: each number of slots is compiled separately."""
HALVING_STEPS = 64
"""Rows are halved only while the longest answer may take this many steps more."""


class Draining:
    """Chooses sizes, and which prompts are read together.

    Args:
        limits: of the decoder.
        by_layer: whether rows are decoded layer by layer; programs then compile quickly.
    """

    def __init__(self, limits: Limits, by_layer: bool) -> None:
        self._limits, self._by_layer = limits, by_layer

    def first(self, need: Need) -> Sizes:
        """The sizes to begin with."""
        rows = min(self._limits.rows, need.pending)
        return Sizes(rows, bucket_length(need.longest), self.ring(need), self._limits.max_stop_tokens)

    def enlarged(self, need: Need, now: Sizes) -> Sizes:
        """The sizes for more or longer requests, while others are decoded."""
        limits = self._limits
        prompt = bucket_length(limits.max_prompt) if bucket_length(need.longest) > now.prompt else now.prompt
        rows = max(now.rows, limits.rows) if need.pending > now.rows else now.rows
        return now._replace(rows=rows, prompt=prompt)

    def ring(self, need: Need) -> int:
        """Slots of the ring for the next chunk: if programs compile quickly, as many as the oldest answer may reach."""
        longest = longest_ring(self._limits)
        if not self._by_layer:
            return longest
        needed = need.reported + self._limits.chunk
        return min(longest, FIRST_RING << (-(-needed // FIRST_RING) - 1).bit_length())

    def reduced(self, need: Need, now: Sizes, *, waiting: bool) -> Sizes:
        """The sizes without what nothing needs: a free row costs as much as a busy one."""
        slots = bucket_length(need.longest)
        if (now.prompt - slots) * RESIZE_SHARE >= now.prompt + now.ring:
            now = now._replace(prompt=slots)
        while not waiting and need.pending <= (half := self.half(need, now.rows)):
            now = now._replace(rows=half)
        return now

    def half(self, need: Need, rows: int) -> int:
        """Half as many rows, or 0 where that is not possible, or not worth a program of its own for the steps left."""
        return half_of(rows) if need.left >= HALVING_STEPS else 0

    def fewest(self, waiting: Sequence[Ticket], rows: int) -> int:
        """The number of free rows, out of all, that is enough to read some of the waiting prompts."""
        return next_prefill(waiting, rows, same=_repeated(waiting)).size

    def layout(self, waiting: Sequence[Ticket], rows: int, free: int) -> PrefillLayout | None:
        """Which of the waiting prompts to read now, one that several requests have once; None while too few rows are
        free."""
        if free < self.fewest(waiting, rows):
            return None
        return next_prefill(waiting, rows, free, many=self._by_layer, same=_repeated(waiting))


def _repeated(waiting: Sequence[Ticket]) -> tuple[int, ...]:
    return repeated(ticket.request for ticket in waiting)
