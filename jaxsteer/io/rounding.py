"""How far the forms in which weights are stored may move a value: half a step of each, and exactly kept ends.

Blocks are 32 values along a row of a stored matrix, the unit of llama.cpp's simple quantisations. Each of those keeps
the ends of a block's range almost exactly, as its scale is a half-precision number made from them; the values between
are off by up to half a step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

BLOCK = 32
"""Values of a block."""

_SLACK = 1.0001  # of the comparison's own arithmetic, in fp32


@dataclass(frozen=True)
class Rounding:
    """What a form keeps of a block of values.

    error  of each value: at most this far from what was rounded, [n]
    kept   functions of a block that the form keeps almost exactly, by name: what they are, and how exactly
    """

    error: np.ndarray
    kept: dict[str, float]


def _half_ulp(values: np.ndarray, digits: int, smallest: int) -> np.ndarray:
    """Half a unit in the last place of values with this many significant binary digits, at least 2**smallest."""
    exponent = np.frexp(values)[1]
    return np.ldexp(1.0, np.maximum(exponent - digits - 1, smallest))


def half_precision(values: np.ndarray) -> np.ndarray:
    """The largest rounding error of values in fp16."""
    return _half_ulp(values, 11, -25)


ENDS: dict[str, Callable[[np.ndarray], float]] = {
    "lowest": lambda values: float(values.min()),
    "highest": lambda values: float(values.max()),
    "largest": lambda values: float(np.abs(values).max()),
}
"""What describes the range of a block."""


def _plain(error: np.ndarray, values: np.ndarray) -> Rounding:
    """A form that rounds each value by itself."""
    where = {"lowest": values.argmin(), "highest": values.argmax(), "largest": np.abs(values).argmax()}
    return Rounding(error, {name: float(error[at]) for name, at in where.items()})


def _symmetric(values: np.ndarray, levels: int, *, clips: bool) -> Rounding:
    """Q8_0 (127 levels on either side), Q4_0 (8) and Q5_0 (16): integers times a scale, made from the largest value.

    `clips`: the other side has one level less, so that a value near its end may be a whole step off.
    """
    largest = np.abs(values).max()
    step = largest / levels
    of_scale = half_precision(step)
    steps = values / step if step else np.full_like(values, levels)  # a scale too small for fp16 becomes 0
    error = step / 2 + np.abs(steps) * of_scale
    if clips:
        sign = np.sign(values[np.abs(values).argmax()])
        error = np.where(steps * sign < 1.5 - levels, error + step / 2, error)
    return Rounding(error, {"largest": float(levels * of_scale)})


def _shifted(values: np.ndarray, levels: int) -> Rounding:
    """Q4_1 (15 levels above the lowest) and Q5_1 (31): integers times a scale, plus the lowest value."""
    lowest, highest = values.min(), values.max()
    step = (highest - lowest) / levels
    of_scale, of_lowest = half_precision(step), half_precision(lowest)
    steps = (values - lowest) / step if step else np.full_like(values, levels)
    error = step / 2 + steps * of_scale + of_lowest
    return Rounding(error, {"lowest": float(of_lowest), "highest": float(levels * of_scale + of_lowest)})


_ROUNDINGS: dict[str, Callable[[np.ndarray], Rounding]] = {
    "F64": lambda values: _plain(np.zeros_like(values), values),
    "F32": lambda values: _plain(np.zeros_like(values), values),
    "F16": lambda values: _plain(half_precision(values), values),
    "BF16": lambda values: _plain(_half_ulp(values, 8, -134), values),
    "Q8_0": lambda values: _symmetric(values, 127, clips=False),
    "Q5_0": lambda values: _symmetric(values, 16, clips=True),
    "Q4_0": lambda values: _symmetric(values, 8, clips=True),
    "Q5_1": lambda values: _shifted(values, 31),
    "Q4_1": lambda values: _shifted(values, 15),
}


def is_known(form: str) -> bool:
    """Whether the rounding of a form is known; that of K-quants, or with an importance matrix, is not."""
    return form in _ROUNDINGS


PLAIN = ("F32", "F16", "BF16")
"""Forms in which a converter finds weights, and through which it goes."""


def is_rounding_of(coarse: np.ndarray, form: str, values: np.ndarray) -> bool:
    """Whether a converter makes `coarse` of these very values, directly or through another of the PLAIN forms.

    That is sharper than `may_be_one`, but does not hold of a model whose two forms were made from a third.

    Args:
        coarse: a block as it comes back from a block format [32].
        form: that format, see `is_quantised`.
        values: the same places in a plain form [32].
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    def through(kind: str, values: np.ndarray) -> np.ndarray:
        return dequantize(quantize(values, GGMLQuantizationType[kind]), GGMLQuantizationType[kind])

    for plain in PLAIN:
        master = values if plain == "F32" else through(plain, values).astype(np.float32)
        again = through(form, master)
        # A value in the middle of two steps may go either way, as compilers order the arithmetic differently.
        off = np.abs(again - coarse)
        tied = np.abs(master - (again + coarse) / 2) <= 0.02 * off
        if np.all((off == 0) | tied):
            return True
    return False


def is_quantised(form: str) -> bool:
    """Whether a form is a block format whose rounding is known."""
    return is_known(form) and form not in (*PLAIN, "F64")


def may_be_one(one: np.ndarray, form: str, other: np.ndarray, other_form: str) -> bool:
    """Whether two blocks can be the same weights in two forms.

    Converters go through fp16, so its rounding is allowed besides those of the two forms.

    Args:
        one, other: values of the same places, [n].
        form, other_form: in which they are stored; both known.
    """
    a, b = one.astype(np.float64), other.astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return np.array_equal(a, b, equal_nan=True)
    first, second = _ROUNDINGS[form](a), _ROUNDINGS[other_form](b)
    between = half_precision(np.maximum(np.abs(a), np.abs(b)))
    if np.any(np.abs(a - b) > _SLACK * (first.error + second.error + between)):
        return False
    return all(
        abs(ENDS[end](a) - ENDS[end](b)) <= _SLACK * (first.kept[end] + second.kept[end] + between.max())
        for end in first.kept.keys() & second.kept.keys()
    )
