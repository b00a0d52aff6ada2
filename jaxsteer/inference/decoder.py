"""Continuous batching with an open queue: finished rows are taken over by waiting requests while the others decode."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxsteer.adapters import Adapters
from jaxsteer.inference.draining import Draining
from jaxsteer.inference.events import Event
from jaxsteer.inference.generate import to_device
from jaxsteer.inference.layouts import (
    ADMITTED,
    PrefillLayout,
    any_scaled,
    drawing_of,
)
from jaxsteer.inference.prefixes import Key, Prefixes
from jaxsteer.inference.reading import Read, Reader, Reading
from jaxsteer.inference.rows import Emitted, Sizes, advance, empty_rows
from jaxsteer.inference.scheduling import Limits, Request
from jaxsteer.inference.sizes import Ladder, Load, Need
from jaxsteer.inference.table import Table, Ticket
from jaxsteer.models.by_layer import layers_to_decode
from jaxsteer.models.config import check_length, check_new_tokens
from jaxsteer.models.strength import check_strength
from jaxsteer.models.transformer import Model, Network
from jaxsteer.sharding import row_shards
from jaxsteer.types import Batch, PyTree, Steering


class Decoder:
    """Decodes requests as they come, up to `limits.rows` at a time.

    `submit` requests at any time, and call `step` while any are `pending`. Answers do not depend on what else is
    decoded, nor on the limits, except for rounding where two tokens are about equally likely (`Event.margin`). What a
    request asks for is data to the compiled programs: other settings compile nothing. Not thread-safe; with several
    processes, all make the same calls.

    Args:
        model, base: as in `forward`.
        steering: as in `forward`, or `Adapters` of the model's plan, of which each request has its own.
        limits: the sizes that programs are compiled for.
        place: puts a numpy batch on the devices that hold the weights.

    Raises:
        ValueError: answers longer than the model's context, or adapters of another plan than the model's.
    """

    def __init__(
        self,
        model: Model,
        base: PyTree,
        steering: Steering | Adapters,
        limits: Limits,
        place: Callable[[Batch], Batch] = to_device,
    ) -> None:
        check_new_tokens(model.config, limits.max_new_tokens)
        self.limits = limits
        self._adapters = steering if isinstance(steering, Adapters) else None
        self._network = Network(model, base, _steering_of(steering, model))
        self._layers = layers_to_decode(base)
        self._ladder = Ladder.of(limits, row_shards())
        self._load = Load(self._ladder, limits)
        self._draining = Draining(limits, self._layers is not None)
        self._prefixes = Prefixes(model.plan, limits.prefix_tokens)
        slots = tuple(slot.name for slot in model.plan)
        self._reader = Reader(limits, slots, self._ladder, self._prefixes, place)
        self._submitted = 0
        self._waiting: deque[Ticket] = deque()
        self._reading: tuple[Ticket, Reading] | None = None  # a prompt of which a part has been read
        self._table: Table | None = None
        self._cancelled: list[Event] = []

    def _stepping(self) -> Network:
        """The network that decodes further tokens: where that is faster, with the blocks layer by layer."""
        if self._layers is None:
            return self._network
        return replace(self._network, base={**self._network.base, "blocks": self._layers})

    @property
    def adapters(self) -> Adapters | None:
        """The adapters that requests choose from."""
        return self._adapters

    def swap(self, adapters: Adapters) -> None:
        """Go on with other adapters, such as with one more (`Adapters.put`); nothing is compiled again.

        Raises:
            ValueError: another plan or number of places, or an adapter that a pending request has would change places.
        """
        old, new = self._adapters, adapters
        if old is None or len(old.names) != len(new.names):
            have = "none" if old is None else f"{len(old.names)} places"
            raise ValueError(f"swap: {len(new.names)} places for adapters, but this decoder was made with {have}")
        steering = _steering_of(new, self._network.model)
        for ticket in self._pending:
            if new.index(ticket.request.adapter) != old.index(ticket.request.adapter):
                raise ValueError(f"swap: adapter {ticket.request.adapter!r} of a pending request changes places")
        self._adapters = adapters
        self._network = replace(self._network, steering=steering)
        self._prefixes.retain(new.versions)

    @property
    def pending(self) -> int:
        """Number of requests that are waiting or being decoded."""
        return self.waiting + self.active

    @property
    def waiting(self) -> int:
        """Number of requests whose prompt has not been read to its end."""
        return len(self._waiting) + (self._reading is not None)

    @property
    def active(self) -> int:
        """Number of requests that are being decoded."""
        return len(self._active)

    @property
    def rows(self) -> int:
        """Number of rows allocated, of which `active` decode."""
        return 0 if self._table is None else len(self._table.tickets)

    @property
    def prefix_hits(self) -> int:
        """Number of prompts so far that began like an earlier one and were not read from their start."""
        return self._prefixes.hits

    @property
    def prefix_tokens_reused(self) -> int:
        """Number of tokens of prompts so far that were not read again."""
        return self._prefixes.tokens_reused

    @property
    def _active(self) -> list[Ticket]:
        return [] if self._table is None else self._table.active

    @property
    def _pending(self) -> list[Ticket]:
        return [*self._waiting, *([self._reading[0]] if self._reading else []), *self._active]

    def check(self, request: Request) -> None:
        """Check that this decoder can answer a request.

        Raises:
            ValueError: it exceeds the limits, needs more positions than the model has learned, gives a strength to a
                slot that the plan does not have, or has an adapter that there is not.
        """
        self._place(request)
        self.limits.check(request)
        check_strength(self._network.model.plan, request.strength)
        check_length(self._network.model.config, len(request) + request.max_new_tokens, request.prompt.source)

    def _place(self, request: Request) -> Request:
        """The request, with the place of its adapter."""
        if self._adapters is not None:
            return replace(request, adapter=self._adapters.index(request.adapter))
        if request.adapter is not None:
            raise ValueError(f"{request.prompt.source}: adapter {request.adapter!r}, but this decoder has no adapters")
        return request

    def submit(self, request: Request) -> int:
        """Add a request to the queue.

        Returns:
            Its id: 0, 1, 2, ...

        Raises:
            ValueError: as in `check`.
        """
        self.check(request)
        ticket = Ticket(self._submitted, request)
        self._submitted += 1
        self._waiting.append(ticket)
        return ticket.id

    def cancel(self, id: int) -> bool:
        """End a request and free its row; the next `step` reports it as cancelled.

        Returns:
            Whether there was anything to cancel: False for a request that has ended, or was never submitted.
        """
        ticket = next((ticket for ticket in self._pending if ticket.id == id), None)
        if ticket is None:
            return False
        if ticket in self._waiting:
            self._waiting.remove(ticket)
        elif self._reading and ticket is self._reading[0]:
            self._reading = None
        else:
            assert self._table is not None
            self._table.remove(ticket)
        no_tokens, no_log_probabilities = np.zeros(0, np.int32), np.zeros(0, np.float32)
        self._cancelled.append(Event(id, no_tokens, no_log_probabilities, "cancelled", ticket.margin))
        return True

    def step(self, *, draining: bool = False) -> list[Event]:
        """Admit waiting requests and decode for at most `limits.chunk` steps.

        Rows and slots follow the load: there are as many, out of few sizes, as the pending requests need or lately
        needed.

        Args:
            draining: no more requests are expected: use only as many rows, and slots for prompts, as the submitted ones
                need, and read whole prompts. Faster, but compiles programs for these sizes.

        Returns:
            An event for each request that has new tokens or has ended.
        """
        events, self._cancelled = self._cancelled, []
        if not self.pending:
            return events
        table = self._sized_to_drain() if draining else self._sized(self._load.sizes(self._need()))
        self._read_parts(table, draining)
        waiting = self._admit(table, draining)
        if not table.active:
            return events
        if draining:
            need = self._need()
            ring = max(table.sizes.ring, self._draining.ring(need))
            reduced = self._draining.reduced(need, table.sizes, waiting=self.waiting > 0)
            table.resize(reduced._replace(ring=ring))
        return events + table.report(self._advance(table, self._enough(waiting, table.sizes.rows, draining)))

    def warm(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Compile what an open queue can need, before its first request: no later load compiles anything.

        What requests ask for may still do so, unless the limits are `general`.

        Args:
            progress: called as progress(done, total), from progress(0, total) on.

        Raises:
            ValueError: requests are pending.
        """
        if self.pending:
            raise ValueError(f"warm: {self.pending} requests are pending; compile before the first")
        tour, seen = list(self._ladder.tour()), set[Sizes]()
        tell = lambda done: progress(done, 1 + len(set(tour))) if progress else None
        tell(0)
        read, prompts = self._reader.warm(self._network, self._adapters)
        tell(1)
        self._table = None
        for sizes in tour:
            table = self._sized(sizes)
            if sizes in seen:
                continue
            for _ in range(1 if seen else 2):  # where the base is committed to a device, new rows are not yet
                table.warm(read, {slots: one for slots, one in prompts.items() if slots <= sizes.prompt})
                table.report(self._advance(table, sizes.rows))
            seen.add(sizes)
            tell(1 + len(seen))

    # ---- sizes

    def _need(self) -> Need:
        pending, chunk = self._pending, self.limits.chunk
        reach = max(min(ticket.reported + chunk, max(1, ticket.request.max_new_tokens - 1)) for ticket in pending)
        reported = max(ticket.reported for ticket in pending)
        left = max((ticket.request.max_new_tokens - ticket.reported for ticket in self._active), default=0)
        return Need(len(pending), max(map(len, pending)), reported, reach, left)

    def _sized(self, sizes: Sizes) -> Table:
        """The rows at a size of the ladder."""
        table = self._table = self._table or self._empty(self._ladder.smallest)
        for step in self._ladder.path(table.sizes, sizes):
            table.resize(step)
        return table

    def _sized_to_drain(self) -> Table:
        """The rows at the size that the submitted requests need, or at least that if any are being decoded."""
        need, table = self._need(), self._table
        if table is not None and table.active:
            table.resize(self._draining.enlarged(need, table.sizes))
            return table
        sizes = self._draining.first(need)
        if table is None or table.sizes != sizes:
            self._table = table = None  # frees the memory first
            self._table = table = self._empty(sizes)
        return table

    def _empty(self, sizes: Sizes) -> Table:
        dtype = jnp.dtype(self._network.base["embed"]["embedding"].dtype).name
        static: Any = {"adapters": self._adapters is not None, "by_layer": self._layers is not None}
        return Table(empty_rows(self._network.model, sizes, dtype, **static))

    # ---- reading prompts, and decoding

    def _read_parts(self, table: Table, draining: bool) -> None:
        """Read `limits.prefill_chunk` tokens of prompts that are read in parts, one prompt after the other."""
        budget = self.limits.prefill_chunk
        while budget > 0 and table.free:
            if self._reading is None and not draining:
                self._begin_to_read(len(table.free))
            if self._reading is None:
                return
            ticket, reading = self._reading
            width, read = self._reader.next_part(self._network, reading)
            budget -= width
            if read is not None:
                self._reading = None
                self._put_each(table, read, [ticket], [reading.key])

    def _begin_to_read(self, free: int) -> None:
        """Begin to read the first of as many waiting prompts as rows are free that is read in parts, if any is."""
        ticket = next((ticket for ticket in islice(self._waiting, free) if self._in_parts(ticket)), None)
        if ticket is not None:
            self._waiting.remove(ticket)
            self._reading = ticket, self._reader.begin(self._network, self._place(ticket.request), self._adapters)

    def _in_parts(self, ticket: Ticket) -> bool:
        return self._reader.in_parts(ticket.request, self._adapters)

    def _admit(self, table: Table, draining: bool) -> list[Ticket]:
        """Let waiting requests take over free rows, once enough are free for an efficient prefill.

        Returns:
            Those that still wait.
        """
        plan, count = self._draining if draining else self._reader, table.sizes.rows
        free = lambda: len(table.free) - (self._reading is not None)
        while (waiting := self._next_waiting(draining)) and (layout := plan.layout(waiting, count, free())):
            tickets = waiting[: layout.size]
            for ticket in tickets:
                self._waiting.remove(ticket)
            size = 1 << (layout.size - 1).bit_length() if draining else ADMITTED
            for read, readers in self._read(tickets, layout, size):
                if draining:
                    row = table.insert(read, readers)
                    table.fill(read.prompts(slice(None), table.sizes.prompt), row)
                else:
                    keys = [self._prefixes.key(ticket.request, self._adapters) for ticket in readers]
                    self._put_each(table, read, readers, keys)
        return waiting

    def _read(self, tickets: list[Ticket], layout: PrefillLayout, size: int) -> list[tuple[Read, list[Ticket]]]:
        """The prompts of a layout, read together; each by itself where one's logits are not finite, as its NaN reaches
        every prompt in its row."""
        requests = [self._place(ticket.request) for ticket in tickets]
        read = self._reader.together(self._network, requests, layout, size)
        if len(tickets) == 1 or not np.asarray(read.progress.failed)[: len(tickets)].any():
            return [(read, tickets)]
        alone = layout._replace(size=1, rows=[[0], *([] for _ in layout.rows[1:])], same=())
        together = partial(self._reader.together, self._network, layout=alone, size=size)
        return [(together([request]), [ticket]) for request, ticket in zip(requests, tickets, strict=True)]

    def _next_waiting(self, draining: bool) -> list[Ticket]:
        """The waiting requests, in order; of an open queue without those that are read in parts."""
        if draining:
            return list(self._waiting)
        return [ticket for ticket in islice(self._waiting, self.limits.rows) if not self._in_parts(ticket)]

    def _put_each(self, table: Table, read: Read, tickets: list[Ticket], keys: list[Key | None]) -> None:
        """Put prompts that were read into free rows, one by one, and keep them for those that begin alike."""
        failed = np.asarray(read.progress.failed) if any(keys) else np.zeros(len(tickets), bool)
        row = table.insert(read, tickets)
        for i, ticket in enumerate(tickets):
            this = slice(i, i + 1)
            prompt = read.prompts(this, self._ladder.prompt_slots(len(ticket)))
            table.fill(prompt, row[this])
            if keys[i] and not failed[i]:
                self._prefixes.add(keys[i], ticket.request.prompt, prompt)

    def _enough(self, waiting: list[Ticket], count: int, draining: bool) -> int:
        """Number of free rows at which decoding stops: to admit others or, when draining, to go on in half the rows."""
        enough = count
        if waiting:
            enough = (self._draining if draining else self._reader).fewest(waiting, count)
        elif self._waiting:  # to be read in parts
            enough = 1
        elif draining:
            enough = count - self._draining.half(self._need(), count)
        return min(count, enough + (self._reading is not None))

    def _advance(self, table: Table, enough: int) -> Emitted:
        """Decode until `enough` rows are free, for at most `limits.chunk` steps."""
        requests, general = [ticket.request for ticket in table.active], self.limits.general
        static: Any = {"scaled": any_scaled(requests, general), "drawing": drawing_of(requests, general)}
        table.rows, emitted = advance(
            self._stepping(), table.rows, table.reported, np.int32(enough), chunk=self.limits.chunk, **static
        )
        return emitted


def _steering_of(steering: Steering | Adapters, model: Model) -> Steering:
    """The steering tree; adapters must have the model's plan."""
    if not isinstance(steering, Adapters):
        return steering
    if steering.plan != model.plan:
        raise ValueError("the adapters' plan is not the model's: use Model(config, adapters.plan)")
    return steering.steering
