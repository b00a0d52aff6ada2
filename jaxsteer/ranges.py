"""Which numbers a setting can have: written in its type, checked before the settings are used.

@dataclass(frozen=True)
class Config:
    batch_size: Count = 8

    def __post_init__(self) -> None:
        check_ranges(self)
"""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any


@dataclass(frozen=True)
class Range:
    """The finite numbers between two ends, which belong to it unless they are open."""

    low: float = -math.inf
    """Lower end."""
    high: float = math.inf
    """Upper end."""
    open_low: bool = False
    """Leave the lower end out."""
    open_high: bool = False
    """Leave the upper end out."""

    def __contains__(self, value: float) -> bool:
        """Whether a number is in it; NaN and infinity never are."""
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return -math.inf < value < math.inf and above and below

    def __str__(self) -> str:
        """As in "must be at least 1"."""
        low, high = (f"{end:g}" if isinstance(end, float) else str(end) for end in (self.low, self.high))
        if -math.inf < self.low and self.high < math.inf and not self.open_low:
            return f"from {low} to {'below ' if self.open_high else ''}{high}"
        ends = [f"{'above' if self.open_low else 'at least'} {low}"] if self.low > -math.inf else []
        if self.high < math.inf:
            ends.append(f"{'below' if self.open_high else 'at most'} {high}")
        return " and ".join(ends) or "finite"


Count = Annotated[int, Range(1)]
"""How many there are of what must be there."""
Natural = Annotated[int, Range(0)]
"""A number of things that may be none."""
Finite = Annotated[float, Range()]
"""Any number but NaN and infinity."""
Positive = Annotated[float, Range(0, open_low=True)]
"""A number above 0."""
NonNegative = Annotated[float, Range(0)]
"""A number of at least 0."""
Fraction = Annotated[float, Range(0, 1, open_high=True)]
"""A share that may be none but not all."""
Inside = Annotated[float, Range(0, 1, open_low=True, open_high=True)]
"""A share that is neither none nor all."""
Seed = Annotated[int, Range(0, 2**32 - 1)]
"""A random seed. `jax.random.key` keeps 32 bits of it: 2³² would be the seed 0."""


def check_ranges(settings: object, prefix: str = "--") -> None:
    """Reject a number that its setting cannot have. None is always allowed; of a tuple, each number is checked.

    Args:
        settings: a dataclass, some of whose types are annotated with a `Range`.
        prefix: what a setting's name begins with in messages; "--" stands for options, which have - in place of _.

    Raises:
        ValueError: names the setting, the number, and what is allowed.
    """
    kind: Any = type(settings)
    for name, allowed in _ranges(kind).items():
        value = getattr(settings, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and number not in allowed:
                shown = name.replace("_", "-") if prefix.startswith("--") else name
                finite = " and finite" if number == math.inf == allowed.high and allowed.low > -math.inf else ""
                raise ValueError(f"{prefix}{shown} must be {allowed}{finite}, got {number}")


@cache
def _ranges(kind: type) -> dict[str, Range]:
    """The ranges of a dataclass's fields, by name."""
    hints = typing.get_type_hints(kind, include_extras=True)
    found = {each.name: _range_in(hints[each.name]) for each in dataclasses.fields(kind)}
    return {name: allowed for name, allowed in found.items() if allowed is not None}


def _range_in(hint: Any) -> Range | None:
    """The range in a type, however deep: that of `tuple[Count, ...] | None` is Count's."""
    own = [each for each in getattr(hint, "__metadata__", ()) if isinstance(each, Range)]
    return next((found for found in [*own, *map(_range_in, typing.get_args(hint))] if found is not None), None)
