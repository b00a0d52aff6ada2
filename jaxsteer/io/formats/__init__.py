"""Formats of other programs: one file each, and one row of `FORMATS` each."""

from jaxsteer.io.formats.format import Format, Given, WriteOptions
from jaxsteer.io.formats.gguf import GGUF
from jaxsteer.io.formats.gguf_control import GGUF_CONTROL, REPENG
from jaxsteer.io.formats.gguf_lora import GGUF_LORA
from jaxsteer.io.formats.steering import STEERING

FORMATS: dict[str, Format] = {row.name: row for row in (STEERING, GGUF, GGUF_LORA, GGUF_CONTROL, REPENG)}
"""Every format by name, in the order in which a path is tried."""

__all__ = ["FORMATS", "Format", "Given", "WriteOptions"]
