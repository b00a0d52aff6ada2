"""Values of a row, of whatever file, as text and as numbers: what counts as missing, and how a number is written.

One rule for every reader. A value is *missing* if the row lacks it, or it is null, NaN or infinite, or a text of white
space alone. A number is written in decimal notation, a whole one without a point (1.0 is "1", 1e-05 is "0.00001"),
because the same table has 1 in one format and 1.0 in another. A boolean is "True" or "False", as in a table's .csv.
"""

from __future__ import annotations

import datetime
import decimal
import math
import numbers
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from jaxsteer.io.files import surrogate_in
from train.data.text_files import refuse_nul

# Values in error messages are abbreviated, and nested only a few levels deep.
_ABBREVIATED = reprlib.Repr()
_ABBREVIATED.maxstring = _ABBREVIATED.maxother = _ABBREVIATED.maxlong = 60

_WORDS = bool | np.bool_ | datetime.date | datetime.time | datetime.timedelta


class EmptyText(ValueError):
    """A row lacks a text that it needs."""


@contextmanager
def located(source: str) -> Iterator[None]:
    """Let the ValueErrors of a block begin with the source, "file:line"."""
    try:
        yield
    except ValueError as error:
        kind = EmptyText if isinstance(error, EmptyText) else ValueError
        raise kind(f"{source}: {error}") from None


def is_missing(value: Any) -> bool:
    """Whether a value is missing: None, NaN, infinite, or a text of white space alone."""
    if isinstance(value, str):
        return not value or value.isspace()
    if isinstance(value, decimal.Decimal):
        return not value.is_finite()
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def as_text(value: Any, name: str) -> str:
    """A value as text; a text is left as it is.

    Args:
        value: a text, number, boolean or date.
        name: of its field, for error messages.

    Raises:
        EmptyText: the value is missing.
        ValueError: a list, an object, or text that is not valid.
    """
    if is_missing(value):
        raise EmptyText(f"{name!r} is {'empty' if isinstance(value, str) else f'missing ({show(value)})'}")
    if isinstance(value, str):
        return valid(value, name)
    if isinstance(value, _WORDS):
        return str(value)
    if isinstance(value, numbers.Integral):
        return str(int(value))
    if isinstance(value, numbers.Real | decimal.Decimal):
        exact = decimal.Decimal(repr(float(value))) if isinstance(value, numbers.Real) else value
        written = f"{exact:f}"
        written = written.rstrip("0").rstrip(".") if "." in written else written
        return "0" if written == "-0" else written
    raise ValueError(f"{name!r} must be a text or a number, got {show(value)}")


def as_weight(value: Any, name: str) -> float:
    """A weight in the loss; 1 if the row has none.

    Args:
        value: a number, or its text in a .csv file; None or "" for none.
        name: of its field, for error messages.

    Raises:
        ValueError: not a number that is finite in float32.
    """
    if value is None or value == "":
        return 1.0
    try:
        weight = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not abs(weight) <= float(np.finfo(np.float32).max):
        raise ValueError(f"{name!r} must be a finite number, the weight in the loss; got {show(value)}")
    return weight


def valid(text: str, name: str) -> str:
    """A text, if UTF-8 can encode it and it has no NUL character.

    Raises:
        ValueError: naming the field.
    """
    refuse_nul(text, repr(name))
    if half := surrogate_in(text):
        raise ValueError(f"{name!r} is not valid text: {half} is half of a surrogate pair")
    return text


def show(value: Any) -> str:
    """A value, abbreviated to fit into a message."""
    text = "null" if value is None else _ABBREVIATED.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
