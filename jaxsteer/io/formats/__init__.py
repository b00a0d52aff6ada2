"""Formats of other programs: one file each, and one row of `FORMATS` each.

`load` reads any of them, `export` writes those that can be written and says how exact the result is.
"""

from jaxsteer.io.formats import peft, pyreft, saelens, steerling
from jaxsteer.io.formats.format import Format, Given, WriteOptions

FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        steerling.FORMAT,  # before peft: its joint folders are PEFT's with one file more
        peft.FORMAT,
        pyreft.FORMAT,
        saelens.FORMAT,
    )
}
"""Every format by name, in the order in which a path is tried."""

__all__ = ["FORMATS", "Format", "Given", "WriteOptions"]
