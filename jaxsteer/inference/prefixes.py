"""Keys and values of prompts' beginnings, kept for prompts that begin alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from jaxsteer.adapters import BASE, Adapters
from jaxsteer.batches import Tokens
from jaxsteer.inference.scheduling import Request
from jaxsteer.models.layers import KeysValues
from jaxsteer.types import Plan

SHORTEST = 32
"""Fewer tokens in common are read again."""
INDEPENDENT = ("all", "prompt", "completion")
"""Kinds of positions that select a token whatever follows it."""


class Key(NamedTuple):
    """What must be the same for two prompts to have the same keys and values.

    version   of the adapter, `Adapters.versions`; None without adapters, or where nothing steers
    strength  of each slot that steers
    """

    version: int | None
    strength: tuple[tuple[str, float], ...]


class Beginning(NamedTuple):
    """The first `length` tokens of a prompt, and the keys and values [L, 1, K, S, H] of at least these."""

    length: int
    keys_values: KeysValues


@dataclass(eq=False)
class _Entry:
    key: Key
    marks: np.ndarray
    keys_values: KeysValues

    @property
    def slots(self) -> int:
        return self.keys_values.k.shape[3]


class Prefixes:
    """Prompts that have been read, the least recently used of which are given up first.

    Args:
        plan: of the model.
        limit: slots for tokens in all entries; 0 = keep nothing.
    """

    def __init__(self, plan: Plan, limit: int) -> None:
        self._plan, self._limit = plan, limit
        self._entries: list[_Entry] = []  # the least recently used first
        self._steering_slots: dict[int, frozenset[str]] = {}  # of an adapter's version
        self.hits = self.tokens_reused = 0

    def key(self, request: Request, adapters: Adapters | None) -> Key | None:
        """The key of a request's prompt; None if it cannot be shared.

        A slot that steers must select a token whatever follows it.
        """
        if not self._limit or len(request) < SHORTEST:
            return None
        steers, version = {slot.name for slot in self._plan}, None
        if adapters is not None:
            place = BASE if request.adapter == BASE else adapters.index(request.adapter)
            version = None if place == BASE else adapters.versions[place]
            steers = set() if version is None else set(self._slots_of(adapters, place))
        slots = [slot for slot in self._plan if slot.name in steers and request.strength.get(slot.name, 1.0) != 0]
        if any(slot.positions.kind not in INDEPENDENT for slot in slots):
            return None
        return Key(
            version if slots else None,
            tuple((slot.name, float(request.strength.get(slot.name, 1.0))) for slot in slots),
        )

    def _slots_of(self, adapters: Adapters, place: int) -> frozenset[str]:
        """The slots of the common plan that this adapter has: where it has none, its parameters are zeros."""
        version = adapters.versions[place]
        if version not in self._steering_slots:
            tree = jax.device_get(adapters.alone(place))
            some = lambda slot: any(np.any(leaf) for leaf in jax.tree.leaves(tree[slot]))
            self._steering_slots[version] = frozenset(filter(some, tree))
        return self._steering_slots[version]

    def find(self, key: Key | None, prompt: Tokens) -> Beginning | None:
        """The longest beginning that a prompt has in common with an entry, all but its last token at most."""
        best: tuple[int, _Entry] | None = None
        marks = None if key is None else _marks(prompt)
        for entry in self._entries:
            if marks is not None and entry.key == key:
                length = min(_common(entry.marks, marks), len(marks) - 1)
                if length >= SHORTEST and (best is None or length >= best[0]):
                    best = length, entry
        if best is None:
            return None
        return Beginning(best[0], best[1].keys_values)

    def use(self, beginning: Beginning) -> None:
        """Count a beginning that is used, which is given up last."""
        entry = next(entry for entry in self._entries if entry.keys_values is beginning.keys_values)
        self._entries.remove(entry)
        self._entries.append(entry)
        self.hits += 1
        self.tokens_reused += beginning.length

    def add(self, key: Key | None, prompt: Tokens, keys_values: KeysValues) -> None:
        """Keep a prompt that has been read, instead of those that are its beginning."""
        if key is None or keys_values.k.shape[3] > self._limit:
            return
        marks = _marks(prompt)
        common = lambda entry: _common(entry.marks, marks) if entry.key == key else 0
        if any(common(entry) == len(marks) for entry in self._entries):
            return
        self._entries = [entry for entry in self._entries if common(entry) < len(entry.marks)]
        self._entries.append(_Entry(key, marks, keys_values))
        while sum(entry.slots for entry in self._entries) > self._limit:
            del self._entries[0]

    def retain(self, versions: tuple[int, ...]) -> None:
        """Give up the entries of adapters that there are no more."""
        self._entries = [entry for entry in self._entries if entry.key.version in (None, *versions)]
        self._steering_slots = {v: slots for v, slots in self._steering_slots.items() if v in versions}


def _marks(prompt: Tokens) -> np.ndarray:
    """Each token with what selects it, int64 [n]: its id, whether it is completion, and whether it is in the prompt."""
    ids, completion = np.asarray(prompt.ids, np.int64), np.array(prompt.completion, np.int64)
    completion[0] = 0
    return ids * 4 + completion * 2 + (np.arange(len(ids)) < prompt.prompt_length)


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """Number of tokens with which both begin."""
    shorter = min(len(one), len(other))
    differ = np.flatnonzero(one[:shorter] != other[:shorter])
    return int(differ[0]) if len(differ) else shorter
