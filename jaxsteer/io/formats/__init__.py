"""Formats of other programs: one file each, and one row of `FORMATS` each."""

from jaxsteer.io.formats.format import Format, Given, WriteOptions
from jaxsteer.io.formats.steering import STEERING

FORMATS: dict[str, Format] = {row.name: row for row in (STEERING,)}
"""Every format by name, in the order in which a path is tried."""

__all__ = ["FORMATS", "Format", "Given", "WriteOptions"]
