"""Formats of other programs: one file each, and one row of `FORMATS` each."""

from jaxsteer.io.formats import (
    adapters,
    gguf,
    gguf_control,
    gguf_lora,
    hf,
    hf_steerable,
    hf_steered,
    mlx,
    peft,
    pyreft,
    saelens,
    steering,
    steerling,
    vllm,
)
from jaxsteer.io.formats.format import Format, Given, WriteOptions
from jaxsteer.plans import did_you_mean

_ROWS = (
    steering.FORMAT,
    hf_steered.FORMAT,
    hf_steerable.FORMAT,
    vllm.FORMAT,
    steerling.FORMAT,  # its joint folders are PEFT's with one file more
    peft.FORMAT,
    adapters.FORMAT,
    mlx.FORMAT,
    pyreft.FORMAT,
    saelens.FORMAT,
    gguf_control.FORMAT,
    gguf_control.REPENG,
    gguf_lora.FORMAT,
    gguf.FORMAT,
    hf.FORMAT,
)

FORMATS: dict[str, Format] = {row.name: row for row in _ROWS}
"""Every format by name, in the order in which a path is tried."""


def find_format(name: str) -> Format:
    """The format by this name.

    Raises:
        ValueError: there is none.
    """
    if name not in FORMATS:
        raise ValueError(f"no format {name!r}{did_you_mean(name, FORMATS)}; the formats are {', '.join(FORMATS)}")
    return FORMATS[name]


def find_writable(name: str) -> Format:
    """The format by this name, which can be written.

    Raises:
        ValueError: there is none, or it is only read.
    """
    if not find_format(name).writable:
        writable = ", ".join(other for other, row in FORMATS.items() if row.writable)
        raise ValueError(f"{name}: this format is only read; these are written: {writable}")
    return FORMATS[name]


__all__ = ["FORMATS", "Format", "Given", "WriteOptions", "find_format", "find_writable"]
