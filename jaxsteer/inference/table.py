"""The rows that decode, and which request each of them has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import numpy as np

from jaxsteer.inference.events import Event, Finished, top_of
from jaxsteer.inference.reading import Read
from jaxsteer.inference.resizing import clear_rows, free_rows, resize
from jaxsteer.inference.rows import Emitted, Rows, Sizes, fill, insert
from jaxsteer.inference.scheduling import Request
from jaxsteer.models.layers import KeysValues


@dataclass(eq=False)
class Ticket:
    """A submitted request, and how many tokens of its answer have been reported."""

    id: int
    request: Request
    reported: int = 0
    margin: float = float("inf")

    def __len__(self) -> int:
        """Tokens of the prompt."""
        return len(self.request)


class Table:
    """Rows, all of which are free at first.

    rows     on the devices
    tickets  the request in each row, or None
    """

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.tickets: list[Ticket | None] = [None] * len(rows.progress.done)

    @property
    def sizes(self) -> Sizes:
        """Sizes of the rows."""
        stops = self.rows.settings.stop_tokens.shape[1]
        return Sizes(len(self.tickets), self.rows.prompt_slots, self.rows.ring, stops)

    @property
    def active(self) -> list[Ticket]:
        """The requests that are decoded."""
        return [ticket for ticket in self.tickets if ticket is not None]

    @property
    def free(self) -> list[int]:
        """The rows without a request."""
        return [row for row, ticket in enumerate(self.tickets) if ticket is None]

    @property
    def reported(self) -> np.ndarray:
        """How many tokens of each row have been reported, int32 [B]."""
        return np.array([0 if ticket is None else ticket.reported for ticket in self.tickets], np.int32)

    def resize(self, sizes: Sizes) -> None:
        """Change the sizes: to no fewer rows than are active, nor fewer slots than these need."""
        if sizes == self.sizes:
            return
        count = len(self.tickets)
        kept = [row for row in range(count) if self.tickets[row]] if sizes.rows < count else list(range(count))
        kept += [row for row in self.free if row not in kept][: sizes.rows - len(kept)]
        kept += [count] * (sizes.rows - len(kept))
        self.rows = resize(self.rows, np.array(kept, np.int32), sizes.prompt, sizes.ring)  # type: ignore[arg-type]
        self.tickets = [None if row == count else self.tickets[row] for row in kept]

    def insert(self, read: Read, tickets: list[Ticket]) -> np.ndarray:
        """Give rows to requests; `fill` must follow.

        Returns:
            The row of each, int32 [n], padded as the prompts are with a row that there is not.
        """
        row = np.full(len(read.admission.length), len(self.tickets), np.int32)
        row[: len(tickets)] = self.free[: len(tickets)]
        for at, ticket in zip(row.tolist(), tickets, strict=False):
            self.tickets[at] = ticket
        self.rows = insert(self.rows, row, read.admission, read.progress)  # type: ignore[arg-type]  # numpy on the host
        return row

    def fill(self, prompts: KeysValues, row: np.ndarray) -> None:
        """Put keys and values of prompts into their rows, int32 [n]."""
        self.rows = fill(self.rows, prompts, row)  # type: ignore[arg-type]  # numpy on the host

    def warm(self, read: Read, prompts: Mapping[int, KeysValues]) -> None:
        """Run the programs that put prompts of these numbers of slots into rows, and those that free and clear them."""
        nowhere = self.insert(read, [])
        for one in prompts.values():
            self.fill(one, nowhere[:1])
        none = np.zeros(len(self.tickets), bool)
        self._free(none)
        self.clear(none)

    def remove(self, ticket: Ticket) -> None:
        """Free the row of a request."""
        row = self.tickets.index(ticket)
        self.tickets[row] = None
        self._free(np.arange(len(self.tickets)) == row)

    def _free(self, mask: np.ndarray) -> None:
        self.rows = free_rows(self.rows, mask)  # type: ignore[arg-type]  # numpy on the host

    def clear(self, failed: np.ndarray) -> None:
        """Zero the cache of rows, bool [B]."""
        self.rows = clear_rows(self.rows, failed)  # type: ignore[arg-type]  # numpy on the host

    def report(self, emitted: Emitted) -> list[Event]:
        """Read what is new in each row, and free the rows that are done."""
        progress = self.rows.progress
        done, stopped, failed, drawn, margin, (tokens, log_probabilities, top) = jax.device_get(
            (progress.done, progress.stopped, progress.failed, progress.drawn, progress.margin, emitted)
        )
        events = []
        for row, ticket in enumerate(self.tickets):
            if ticket is None:
                continue
            new = int(drawn[row]) - ticket.reported
            ticket.reported, ticket.margin = int(drawn[row]), float(margin[row])
            finished: Finished | None = None
            if done[row]:
                finished = "stop" if stopped[row] else "nonfinite" if failed[row] else "length"
                self.tickets[row] = None
            if new or finished:
                parts = tokens[row, :new].copy(), log_probabilities[row, :new].copy()
                likeliest = top_of(top, row, new, ticket.request.top)
                events.append(Event(ticket.id, *parts, finished, ticket.margin, likeliest))
        if any(event.finished == "nonfinite" for event in events):
            self.clear(failed)
        return events
