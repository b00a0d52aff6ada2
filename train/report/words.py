"""Figures, times and lists in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any


def number(value: Any) -> float:
    """A value as a float; NaN if it is not a number."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def count(value: Any) -> str:
    """E.g. "276,480"."""
    return f"{value:,}" if isinstance(value, int) else str(value)


def share(value: float, digits: int = 1) -> str:
    """E.g. "65.4 %"."""
    return f"{100 * value:.{digits}f} %"


def small_share(value: float) -> str:
    """A share with two significant digits, e.g. "0.21 %"."""
    return f"{100 * value:.2g} %" if value < 0.1 else share(value)


def interval(ends: Sequence[float]) -> str:
    """Ends of a share's interval, e.g. "61.2 to 69.4"."""
    low, high = ends
    return f"{100 * low:.1f} to {100 * high:.1f}"


def duration(seconds: float) -> str:
    """E.g. "135 s", "12 min", "3 h 20 min"."""
    if seconds < 180:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    days, rest = divmod(hours, 24)
    return f"{days} d {rest} h" if days > 2 else f"{hours} h {minutes} min"


def moment(text: Any) -> datetime | None:
    """A time as runs note it; None if it is not one."""
    try:
        return datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None


def date(text: Any) -> str:
    """A noted time, e.g. "2026-01-31 14:05 UTC"."""
    when = moment(text)
    return str(text) if when is None else f"{when:%Y-%m-%d %H:%M} {when.tzname() or ''}".rstrip()


def listed(words: Sequence[str], most: int = 6) -> str:
    """Words with commas; those after the first `most` are only counted."""
    more = f", and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more


def facts(values: Mapping[str, Any]) -> str:
    """E.g. "jax 0.10.0, flax 0.12.0"."""
    return ", ".join(f"{name} {value}" for name, value in values.items())
