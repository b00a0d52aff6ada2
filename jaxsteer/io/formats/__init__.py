"""Formats of other programs: one file each, and one row of `FORMATS` each.

`load` reads any of them, `export` writes those that can be written and says how exact the result is.
"""

from jaxsteer.io.formats.format import Format, Given, WriteOptions
from jaxsteer.io.formats.hf import HF
from jaxsteer.io.formats.hf_steerable import HF_STEERABLE
from jaxsteer.io.formats.hf_steered import HF_STEERED

FORMATS: dict[str, Format] = {format.name: format for format in (HF_STEERED, HF_STEERABLE, HF)}
"""Every format by name, in the order in which a path is tried."""

__all__ = ["FORMATS", "Format", "Given", "WriteOptions"]
