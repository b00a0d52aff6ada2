"""Continuous batching with an open queue: finished rows are taken over by waiting requests while the others decode."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.adapters import Adapters
from jaxsteer.batches import bucket_length
from jaxsteer.inference.events import Answer, Event, Finished, answer_of, joined, top_of
from jaxsteer.inference.generate import to_device
from jaxsteer.inference.rows import (
    Emitted,
    Rows,
    Sizes,
    add_rows,
    advance,
    clear_rows,
    empty_rows,
    fill,
    free_rows,
    insert,
    keep_rows,
    prefill,
    resize_slots,
)
from jaxsteer.inference.scheduling import (
    Limits,
    Request,
    half_of,
    make_admission,
    next_prefill,
    prefill_adapters,
    prefill_batch,
    prefill_strength,
    wanted,
)
from jaxsteer.models.by_layer import layers_to_decode
from jaxsteer.models.config import check_length, check_new_tokens
from jaxsteer.models.strength import check_strength
from jaxsteer.models.transformer import Model, Network
from jaxsteer.types import Batch, PyTree, Steering

FIRST_RING = 128
"""Slots for generated tokens of each row to start with, doubled as answers reach them."""
RESIZE_SHARE = 4
"""Slots for prompts are given up once they are 1 / RESIZE_SHARE of all: each number of slots is compiled separately."""
HALVING_STEPS = 64
"""Rows are halved only while the longest answer may take this many steps more."""


@dataclass(eq=False)
class _Ticket:
    """A submitted request, and how many tokens of its answer have been reported."""

    id: int
    request: Request
    reported: int = 0
    margin: float = float("inf")

    def __len__(self) -> int:
        return len(self.request)


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
        self._slots = tuple(slot.name for slot in model.plan)
        self._adapters = steering if isinstance(steering, Adapters) else None
        self._network = Network(model, base, _steering_of(steering, model))
        self._layers = layers_to_decode(base)
        self._to_devices = place
        self._submitted = 0
        self._waiting: deque[_Ticket] = deque()
        self._cancelled: list[Event] = []
        self._tickets: list[_Ticket | None] = []  # in each row
        self._rows: Rows | None = None

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
        for ticket in (*self._waiting, *self._active):
            if new.index(ticket.request.adapter) != old.index(ticket.request.adapter):
                raise ValueError(f"swap: adapter {ticket.request.adapter!r} of a pending request changes places")
        self._adapters = adapters
        self._network = replace(self._network, steering=steering)

    @property
    def _by_layer(self) -> bool:
        return self._layers is not None

    @property
    def pending(self) -> int:
        """Number of requests that are waiting or being decoded."""
        return len(self._waiting) + len(self._active)

    @property
    def waiting(self) -> int:
        """Number of requests whose prompt has not been read to its end."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Number of requests that are being decoded."""
        return len(self._active)

    @property
    def rows(self) -> int:
        """Number of rows allocated, of which `active` decode."""
        return len(self._tickets)

    @property
    def prefix_hits(self) -> int:
        """Number of prompts so far that began like an earlier one and were not read from their start."""
        return 0

    @property
    def prefix_tokens_reused(self) -> int:
        """Number of tokens of prompts so far that were not read again."""
        return 0

    def warm(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Compile what an open queue needs, whatever its load, before the first request. For `step` without draining.

        Args:
            progress: called as progress(done, total) after each of `total` parts of the work.

        Raises:
            ValueError: requests are pending.
        """
        if self.pending:
            raise ValueError(f"warm: {self.pending} requests are pending; compile before the first")
        if progress:
            progress(0, 0)

    @property
    def _active(self) -> list[_Ticket]:
        return [ticket for ticket in self._tickets if ticket is not None]

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
        ticket = _Ticket(self._submitted, request)
        self._submitted += 1
        self._waiting.append(ticket)
        return ticket.id

    def cancel(self, id: int) -> bool:
        """End a request and free its row; the next `step` reports it as cancelled.

        Returns:
            Whether there was anything to cancel: False for a request that has ended, or was never submitted.
        """
        ticket = next((ticket for ticket in (*self._waiting, *self._active) if ticket.id == id), None)
        if ticket is None:
            return False
        if ticket in self._waiting:
            self._waiting.remove(ticket)
        else:
            assert self._rows is not None
            row = self._tickets.index(ticket)
            self._tickets[row] = None
            self._rows = free_rows(self._rows, np.arange(len(self._tickets)) == row)
        no_tokens, no_log_probabilities = np.zeros(0, np.int32), np.zeros(0, np.float32)
        self._cancelled.append(Event(id, no_tokens, no_log_probabilities, "cancelled", ticket.margin))
        return True

    def step(self, *, draining: bool = False) -> list[Event]:
        """Admit waiting requests and decode for at most `limits.chunk` steps.

        Args:
            draining: no more requests are expected: use only as many rows, and slots for prompts, as the submitted ones
                need. Faster, but compiles programs for the smaller sizes. Later requests get the full size back.

        Returns:
            An event for each request that has new tokens or has ended.
        """
        events, self._cancelled = self._cancelled, []
        if not self.pending:
            return events
        self._make_rows(draining)
        self._admit(draining)
        if draining:
            self._shrink()
        return events + self._report(self._advance(draining))

    def _make_rows(self, draining: bool) -> None:
        """Allocate or enlarge the rows so that every waiting request fits."""
        limits, rows = self.limits, self._rows
        count, slots = limits.rows, bucket_length(limits.max_prompt)
        if rows is not None and self._active:
            if self._longest() > rows.prompt_slots:
                self._rows = rows = resize_slots(rows, slots, rows.ring)
            if self.pending > len(self._tickets) and len(self._tickets) < count:
                self._rows = add_rows(rows, count)
                self._tickets += [None] * (count - len(self._tickets))
            return
        if draining:
            count, slots = min(count, len(self._waiting)), self._longest()
        sizes = Sizes(count, slots, self._ring(), limits.max_stop_tokens)
        if rows is not None and (len(self._tickets), rows.prompt_slots, rows.ring) == sizes[:3]:
            return
        self._rows = rows = None  # frees the memory first
        dtype = jnp.dtype(self._network.base["embed"]["embedding"].dtype).name
        static: Any = {"adapters": self._adapters is not None, "by_layer": self._by_layer}
        self._rows = empty_rows(self._network.model, sizes, dtype, **static)
        self._tickets = [None] * count

    def _longest(self) -> int:
        """Slots needed for the longest prompt, waiting or being decoded."""
        return bucket_length(max(map(len, (*self._waiting, *self._active))))

    def _ring(self) -> int:
        """Slots of the ring for the next chunk: one fewer than an answer's tokens, the last of which is never read.

        Where programs compile quickly, only as many as the oldest answer may reach.
        """
        longest = max(1, self.limits.max_new_tokens - 1)
        if not self._by_layer:
            return longest
        needed = max((ticket.reported for ticket in self._active), default=0) + self.limits.chunk
        return min(longest, FIRST_RING << (-(-needed // FIRST_RING) - 1).bit_length())

    def _admit(self, draining: bool) -> None:
        """Let waiting requests take over free rows, once enough are free for an efficient prefill."""
        assert self._rows is not None
        count, many = len(self._tickets), self._by_layer and draining
        free = [row for row, ticket in enumerate(self._tickets) if ticket is None]
        while self._waiting and len(free) >= next_prefill(self._waiting, count).size:
            layout = next_prefill(self._waiting, count, len(free), many=many)
            tickets = [self._waiting.popleft() for _ in range(layout.size)]
            requests = [self._place(ticket.request) for ticket in tickets]
            taken, free = free[: layout.size], free[layout.size :]
            batch = self._to_devices(prefill_batch(requests, layout))
            strength: Any = prefill_strength(requests, layout, self._slots) if _any_scaled(tickets) else None
            adapters: Any = prefill_adapters(requests, layout)
            hidden, prefilled = prefill(self._network, batch, strength, adapters)
            stop_width = self.limits.max_stop_tokens
            admission = make_admission(requests, layout, taken, no_row=count, stop_width=stop_width, slots=self._slots)
            rows, prompts = insert(self._network, self._rows, hidden, prefilled, admission, **wanted(requests))
            self._rows = fill(rows, prompts, admission.row)
            for row, ticket in zip(taken, tickets, strict=True):
                self._tickets[row] = ticket

    def _shrink(self) -> None:
        """Give up slots and rows that nothing needs: a free row costs as much as a busy one."""
        assert self._rows is not None
        slots, now, ring = self._longest(), self._rows.prompt_slots, self._rows.ring
        if (now - slots) * RESIZE_SHARE >= now + ring:
            self._rows = resize_slots(self._rows, slots, ring)
        while not self._waiting and len(self._active) <= (half := self._half()):
            kept = sorted(range(len(self._tickets)), key=lambda row: self._tickets[row] is None)[:half]
            self._rows = keep_rows(self._rows, np.array(kept, np.int32))
            self._tickets = [self._tickets[row] for row in kept]

    def _half(self) -> int:
        """Half as many rows, or 0 where that is not possible, or not worth a program of its own for the steps left."""
        left = max(ticket.request.max_new_tokens - ticket.reported for ticket in self._active)
        return half_of(len(self._tickets)) if left >= HALVING_STEPS else 0

    def _advance(self, draining: bool) -> Emitted:
        """Decode until enough rows are done: to admit others or, when draining, to continue in half as many rows."""
        assert self._rows is not None
        count, ring = len(self._tickets), self._ring()
        if ring > self._rows.ring:
            self._rows = resize_slots(self._rows, self._rows.prompt_slots, ring)
        if self._waiting:
            enough = next_prefill(self._waiting, count).size
        else:
            enough = count - self._half() if draining else count
        reported = np.array([0 if ticket is None else ticket.reported for ticket in self._tickets], np.int32)
        static: Any = {"scaled": _any_scaled(self._active), **wanted([ticket.request for ticket in self._active])}
        self._rows, emitted = advance(
            self._stepping(), self._rows, reported, np.int32(enough), chunk=self.limits.chunk, **static
        )
        return emitted

    def _report(self, emitted: Emitted) -> list[Event]:
        """Read what is new in each row, and free the rows that are done."""
        assert self._rows is not None
        progress = self._rows.progress
        done, stopped, failed, drawn, margin, (tokens, log_probabilities, top) = jax.device_get(
            (progress.done, progress.stopped, progress.failed, progress.drawn, progress.margin, emitted)
        )
        events = []
        for row, ticket in enumerate(self._tickets):
            if ticket is None:
                continue
            new = int(drawn[row]) - ticket.reported
            ticket.reported, ticket.margin = int(drawn[row]), float(margin[row])
            finished: Finished | None = None
            if done[row]:
                finished = "stop" if stopped[row] else "nonfinite" if failed[row] else "length"
                self._tickets[row] = None
            if new or finished:
                parts = tokens[row, :new].copy(), log_probabilities[row, :new].copy()
                events.append(
                    Event(ticket.id, *parts, finished, ticket.margin, top_of(top, row, new, ticket.request.top))
                )
        if any(event.finished == "nonfinite" for event in events):
            self._rows = clear_rows(self._rows, failed)
        return events


def _steering_of(steering: Steering | Adapters, model: Model) -> Steering:
    """The steering tree; adapters must have the model's plan."""
    if not isinstance(steering, Adapters):
        return steering
    if steering.plan != model.plan:
        raise ValueError("the adapters' plan is not the model's: use Model(config, adapters.plan)")
    return steering.steering


def _any_scaled(tickets: Sequence[_Ticket]) -> bool:
    return any(factor != 1 for ticket in tickets for factor in ticket.request.strength.values())


def generate_all(
    decoder: Decoder,
    requests: Sequence[Request],
    ended: Callable[[int, np.ndarray], bool] | None = None,
) -> Iterator[tuple[int, Answer]]:
    """Answer every request, longest prompts first.

    Args:
        decoder: with nothing pending.
        requests: to answer.
        ended: called as ended(index, tokens so far) after every chunk with the index of an unfinished request; True
            ends the answer there, which then counts as stopped.

    Yields:
        (index of the request, its answer), as they finish.

    Raises:
        ValueError: the decoder has requests pending, or one of these does not fit it.
    """
    if decoder.pending:
        raise ValueError(f"generate_all needs a decoder to itself, but this one has {decoder.pending} requests pending")
    for request in requests:
        decoder.check(request)
    order = sorted(range(len(requests)), key=lambda index: -len(requests[index]))
    indices = {decoder.submit(requests[index]): index for index in order}
    received: dict[int, list[Event]] = {id: [] for id in indices}
    try:
        while received:
            for event in decoder.step(draining=True):
                if event.id not in received:  # cancelled by an earlier call that was not read to its end
                    continue
                received[event.id].append(event)
                if event.finished:
                    yield indices[event.id], answer_of(received.pop(event.id))
                elif ended and ended(indices[event.id], joined(received[event.id], "tokens")):
                    decoder.cancel(event.id)
    finally:
        for id in received:
            decoder.cancel(id)
