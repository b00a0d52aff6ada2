"""Formats of other programs: one file each, and one row of `FORMATS` each."""

from jaxsteer.io.formats import peft
from jaxsteer.io.formats.format import Format, Given, WriteOptions
from jaxsteer.io.formats.hf import HF
from jaxsteer.io.formats.hf_steerable import HF_STEERABLE
from jaxsteer.io.formats.hf_steered import HF_STEERED
from jaxsteer.io.formats.steering import STEERING

FORMATS: dict[str, Format] = {row.name: row for row in (STEERING, HF_STEERED, HF_STEERABLE, HF, peft.FORMAT)}
"""Every format by name, in the order in which a path is tried."""

__all__ = ["FORMATS", "Format", "Given", "WriteOptions"]
