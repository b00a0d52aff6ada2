"""The host side of reading prompts: several at once, or a long one in parts between which others are decoded."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxsteer.adapters import BASE, Adapters
from jaxsteer.inference.layouts import (
    ADMIT_SHARE,
    ADMITTED,
    PrefillLayout,
    any_scaled,
    drawing_of,
    make_admission,
    open_prefill,
    part_adapters,
    part_batch,
    part_strength,
    prefill_adapters,
    prefill_batch,
    prefill_strength,
    widths_of,
)
from jaxsteer.inference.prefill import empty_prompt, first_tokens, prefill, prompts_of, read_part, resume_prompt
from jaxsteer.inference.prefixes import Beginning, Key, Prefixes
from jaxsteer.inference.rows import Admission, Progress
from jaxsteer.inference.scheduling import Limits, Request
from jaxsteer.inference.sizes import Ladder
from jaxsteer.models.layers import KeysValues
from jaxsteer.models.transformer import Network
from jaxsteer.sharding import row_shards
from jaxsteer.types import Array, Batch, Cache


class Read(NamedTuple):
    """Prompts that have been read to their ends: where they are in a cache, and the first tokens of their answers."""

    admission: Admission
    progress: Progress
    cache: Cache

    def prompts(self, which: slice, slots: int) -> KeysValues:
        """Keys and values of some of the prompts, [L, n, K, slots, H]."""
        source, start, length = (field[which] for field in self.admission[:3])
        return prompts_of(self.cache, source, start, length, slots)


@dataclass(eq=False)
class Reading:
    """A prompt that is being read in parts.

    request  with the place of its adapter
    key      under which its keys and values may be kept
    cache    of the tokens so far, and slots for the others
    read     number of tokens so far
    """

    request: Request
    key: Key | None
    cache: Cache
    read: int


class Reader:
    """Reads prompts for a decoder.

    Args:
        limits: of the decoder.
        slots: names of the plan's slots.
        ladder: sizes of an open queue.
        prefixes: beginnings of prompts that were read.
        place: puts a numpy batch on the devices.
    """

    def __init__(
        self,
        limits: Limits,
        slots: Sequence[str],
        ladder: Ladder,
        prefixes: Prefixes,
        place: Callable[[Batch], Batch],
    ) -> None:
        self.prefixes, self.widths = prefixes, widths_of(limits)
        self._part_widths = tuple(sorted({self.widths[0], self.widths[-1]}))
        self._limits, self._slots, self._ladder, self._place = limits, slots, ladder, place

    # ---- several at once

    def fewest(self, waiting: Sequence[Sized], rows: int) -> int:
        """The number of free rows, out of all, that is enough to read some of the waiting prompts."""
        return open_prefill(waiting, self.widths, -(-rows // ADMIT_SHARE)).size

    def layout(self, waiting: Sequence[Sized], rows: int, free: int) -> PrefillLayout | None:
        """Which of the waiting prompts to read now; None while too few rows are free."""
        return open_prefill(waiting, self.widths, free) if free >= self.fewest(waiting, rows) else None

    def together(self, network: Network, requests: Sequence[Request], layout: PrefillLayout, size: int) -> Read:
        """Read the requests of a layout, in programs for `size` of them."""
        general = self._limits.general
        batch = self._place(prefill_batch(requests, layout))
        strength: Any = prefill_strength(requests, layout, self._slots) if any_scaled(requests, general) else None
        adapters: Any = prefill_adapters(requests, layout)
        hidden, cache = prefill(network, batch, strength, adapters)
        admission = make_admission(requests, layout, size, stop_width=self._limits.max_stop_tokens, slots=self._slots)
        return Read(admission, first_tokens(network, hidden, admission, drawing_of(requests, general)), cache)

    # ---- in parts

    def in_parts(self, request: Request, adapters: Adapters | None) -> bool:
        """Whether a prompt is read in parts: because it is long, or as most of it has been read before."""
        if len(request) > self._limits.prefill_chunk:
            return True
        beginning = self._beginning(request, self.prefixes.key(request, adapters))
        return beginning is not None

    def _beginning(self, request: Request, key: Key | None) -> Beginning | None:
        """What need not be read again of a prompt, if that saves anything."""
        found = self.prefixes.find(key, request.prompt)
        if found is None:
            return None
        rest = sum(width for width, _ in self._parts(len(request) - found.length))
        whole = next((width for width in self.widths if width >= len(request)), len(request))
        return found if rest < whole else None

    def _parts(self, tokens: int) -> Iterator[tuple[int, int]]:
        """(width, number of tokens) of each part in which a number of tokens is read.

        A part that is not the last has a column more: whether a token is the prompt's last depends on the next one.
        """
        widest = self.widths[-1]
        while tokens > widest:
            yield widest, widest - 1
            tokens -= widest - 1
        yield next(width for width in self._part_widths if width >= tokens), tokens

    def begin(self, network: Network, request: Request, adapters: Adapters | None) -> Reading:
        """Begin to read a prompt in parts, after what has been read of it before."""
        key = self.prefixes.key(request, adapters)
        slots = self._ladder.prompt_slots(len(request)) + self.widths[-1]
        if (found := self._beginning(request, key)) is None:
            return Reading(request, key, self._empty(network, slots), 0)
        self.prefixes.use(found)
        return Reading(request, key, resume_prompt(found.keys_values, np.int32(found.length), slots), found.length)

    def _empty(self, network: Network, slots: int) -> Cache:
        dtype = jnp.dtype(network.base["embed"]["embedding"].dtype).name
        return empty_prompt(network.model, slots, dtype)

    def next_part(self, network: Network, reading: Reading) -> tuple[int, Read | None]:
        """Read the next part of a prompt: its width, and the prompt if that was the last."""
        request, start = reading.request, reading.read
        width, count = next(self._parts(len(request) - start))
        scaled = any_scaled([request], self._limits.general)
        batch, strength = part_batch(request, start, width), part_strength(request, width, self._slots)
        adapters: Any = part_adapters(request, width)
        hidden, reading.cache = read_part(
            network, self._place(batch), np.int32(count), reading.cache, strength if scaled else None, adapters
        )
        reading.read += count
        if reading.read < len(request):
            return width, None
        return width, self._ended(network, reading, hidden, np.int32(count - 1))

    def _ended(self, network: Network, reading: Reading, hidden: Array, last: np.int32) -> Read:
        """A prompt that has been read to its end, given the column of its last token."""
        alone, limits = [reading.request], self._limits
        layout = PrefillLayout(1, [[0]], len(reading.request))
        admission = make_admission(alone, layout, ADMITTED, stop_width=limits.max_stop_tokens, slots=self._slots)
        admission = admission._replace(last=np.full(ADMITTED, last))  # type: ignore[arg-type]  # numpy on the host
        progress = first_tokens(network, hidden, admission, drawing_of(alone, limits.general))
        return Read(admission, progress, reading.cache)

    # ---- before the first request

    def warm(self, network: Network, adapters: Adapters | None) -> tuple[Read, dict[int, KeysValues]]:
        """Run every program that an open queue can need to read prompts.

        Returns:
            Prompts that were read, and the keys and values of one for each number of slots that a prompt may have.
        """
        place, limits = None if adapters is None else BASE, self._limits
        dummy = lambda length: Request(_Dummy(length), 1, adapter=place)
        windows = {}
        for width in self.widths:
            request = dummy(min(width, limits.max_prompt))
            layout = PrefillLayout(1, [[0], *([] for _ in range(row_shards() - 1))], width)
            read = self.together(network, [request], layout, ADMITTED)
            for slots in self._ladder.prompts_up_to(len(request)):
                windows[slots] = read.prompts(slice(0, 1), slots)
        for slots in {level.prompt for level in self._ladder.slots}:
            if limits.prefix_tokens or slots > self.widths[-1]:
                windows[slots] = self._warm_parts(network, dummy(min(slots, limits.max_prompt)), slots)
        if limits.prefix_tokens:
            for slots, beginning in itertools.product(windows, windows.values()):
                resume_prompt(beginning, np.int32(1), slots + self.widths[-1])
        return read, windows

    def _warm_parts(self, network: Network, request: Request, slots: int) -> KeysValues:
        """Run the programs that read a prompt of `slots` slots in parts."""
        for width in self._part_widths:
            reading = Reading(request, None, self._empty(network, slots + self.widths[-1]), 0)
            for _ in range(2):  # where the base is committed to a device, a new cache is not yet
                reading.read = max(0, len(request) - width)
                _, read = self.next_part(network, reading)
        assert read is not None
        return read.prompts(slice(0, 1), slots)


class _Dummy:
    """A prompt of token 0."""

    source = "warm"

    def __init__(self, length: int) -> None:
        self.ids, self.prompt_length = np.zeros(length, np.int32), length
        self.completion, self.weights = np.zeros(length, bool), np.zeros(length, np.float32)
