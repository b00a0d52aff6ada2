"""Figures as text."""

from __future__ import annotations

from typing import Any


def shown(value: Any, digits: int = 4) -> str:
    """A number with `digits` significant digits, or all digits before the point; "" for None; else the value's text."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 10 ** (digits - 1) else f"{value:,.{digits}g}"
