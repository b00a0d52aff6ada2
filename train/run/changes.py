"""What differs between two sets of settings, by name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

MISSING = "(missing)"
"""In place of the value of a setting that is not there."""


class Change(NamedTuple):
    """A setting that differs; the names of nested settings are joined by dots."""

    name: str
    old: Any
    new: Any

    def __str__(self) -> str:
        """E.g. "optim.lr is 0.1 there, 0.2 here"."""
        show = lambda value: "missing" if value is MISSING else json.dumps(value)
        return f"{self.name} is {show(self.old)} there, {show(self.new)} here"


def changes_of(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[Change]:
    """Each setting that differs, in alphabetical order."""
    old, new = flat(there), flat(here)
    changes = [Change(name, old.get(name, MISSING), new.get(name, MISSING)) for name in sorted(old.keys() | new.keys())]
    return [change for change in changes if not same(change.old, change.new)]


def listed(changes: Sequence[Change]) -> str:
    """Changes as a part of a sentence."""
    return "; ".join(map(str, changes))


def covers(names: Sequence[str], name: str) -> bool:
    """Whether a setting is one of `names` or, as "optim.lr" in "optim", a part of one."""
    return any(name == each or name.startswith(f"{each}.") for each in names)


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal: 1 and 1.0 are one number, but True is not 1."""
    return bool(a == b) and isinstance(a, bool) == isinstance(b, bool)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their whole names: {"optim": {"lr": 0.1}} is {"optim.lr": 0.1}."""
    out: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            out |= flat(value, f"{prefix}{name}.")
        else:
            out[f"{prefix}{name}"] = value
    return out
