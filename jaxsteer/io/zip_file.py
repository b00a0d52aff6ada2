"""The directory of a zip archive whose members are stored without compression, as PyTorch writes them.

Python's zipfile is not used: it allocates by what the archive claims, and raises a dozen kinds of errors on damaged
ones.
"""

from __future__ import annotations

import os
import reprlib
import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

END, END64, LOCATOR64, ENTRY, LOCAL = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07", b"PK\x01\x02", b"PK\x03\x04"
DIRECTORY_LIMIT = 1 << 26  # bytes; a model of a thousand tensors takes 0.1 million
TAIL = 22 + (1 << 16)  # the end record with the longest comment
ENCRYPTED = 1
FILLED = {2: 0xFFFF, 4: 0xFFFFFFFF}


class Member(NamedTuple):
    """Where a member's bytes are in the archive."""

    begin: int
    size: int


def open_zip(path: Path) -> dict[str, Member]:
    """The members of an archive by name; nothing but the directory and the members' headers is read.

    Raises:
        ValueError: the file is damaged; a member is compressed, encrypted, given twice, overlaps another one, or has a
            name that points out of a folder.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        begin, length, count = _directory(file, size)
        if length > min(DIRECTORY_LIMIT, size - begin):
            raise ValueError(f"its directory claims {length} bytes from byte {begin} on, of {size}")
        file.seek(begin)
        entries = _entries(file.read(length), count)
        members = {name: _member(file, name, at, stored, begin) for name, (at, stored) in entries.items()}
    end = 0
    for name, member in sorted(members.items(), key=lambda item: item[1]):
        if member.begin < end:
            raise ValueError(f"its member {reprlib.repr(name)} overlaps another one")
        end = member.begin + member.size
    return members


def _directory(file: BinaryIO, size: int) -> tuple[int, int, int]:
    """Where the directory begins, its length, and its number of entries."""
    file.seek(max(size - TAIL, 0))
    tail = file.read(TAIL)
    at = tail.rfind(END)
    if at < 0 or len(tail) - at < 22:
        raise ValueError("it has no directory at its end")
    here = max(size - TAIL, 0) + at
    count, length, begin = struct.unpack_from("<HII", tail, at + 10)
    if FILLED[2] == count or FILLED[4] in (length, begin):
        if here < 20:
            raise ValueError("its directory is damaged")
        file.seek(here - 20)
        mark, _, record = struct.unpack("<4sIQ", file.read(20)[:16])
        if mark != LOCATOR64 or record > here - 76:
            raise ValueError("its directory is damaged")
        file.seek(record)
        mark, *_, count, length, begin = struct.unpack("<4sQHHIIQQQQ", file.read(56))
        if mark != END64:
            raise ValueError("its directory is damaged")
    if begin + length > here:
        raise ValueError(f"its directory would end at byte {begin + length} of {here}")
    return begin, length, count


def _entries(data: bytes, count: int) -> dict[str, tuple[int, int]]:
    """The directory's entries: name -> (where its local header is, its size)."""
    entries: dict[str, tuple[int, int]] = {}
    at = 0
    while at < len(data):
        if data[at : at + 4] != ENTRY or len(data) - at < 46:
            raise ValueError(f"its directory is damaged at entry {len(entries)}")
        flags, method = struct.unpack_from("<HH", data, at + 8)
        packed, size, *lengths = struct.unpack_from("<IIHHH", data, at + 20)
        header = struct.unpack_from("<I", data, at + 42)[0]
        name = data[at + 46 : at + 46 + lengths[0]].decode()
        extra = data[at + 46 + lengths[0] : at + 46 + lengths[0] + lengths[1]]
        at += 46 + sum(lengths)
        _check_name(name)
        if name in entries:
            raise ValueError(f"its member {reprlib.repr(name)} is given twice")
        size, packed, header = _wide(extra, [size, packed, header])
        if method or packed != size or flags & ENCRYPTED:
            raise ValueError(f"its member {reprlib.repr(name)} is compressed or encrypted, which PyTorch does not do")
        entries[name] = header, size
    if at != len(data) or len(entries) != count:
        raise ValueError(f"its directory has {len(entries)} entries, expected {count}")
    return entries


def _check_name(name: str) -> None:
    """Refuse a name that would lie outside of a folder; nothing is unpacked, but no honest archive has one."""
    if name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/"):
        raise ValueError(f"its member {reprlib.repr(name)} points out of the archive")


def _wide(extra: bytes, values: list[int]) -> list[int]:
    """Sizes and offset with those that do not fit 32 bits taken from the zip64 field."""
    at, wide = 0, b""
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            wide = extra[at + 4 : at + 4 + length]
        at += 4 + length
    for i, value in enumerate(values):
        if value == FILLED[4]:
            if len(wide) < 8:
                raise ValueError("its directory lacks the size of a member")
            values[i], wide = struct.unpack_from("<Q", wide)[0], wide[8:]
    return values


def _member(file: BinaryIO, name: str, header: int, size: int, end: int) -> Member:
    """A member, checked against its local header; the members end where the directory begins."""
    if header + 30 > end:
        raise ValueError(f"its member {reprlib.repr(name)} would begin at byte {header} of {end}")
    file.seek(header)
    fields = file.read(30)
    name_length, extra_length = struct.unpack_from("<HH", fields, 26)
    begin = header + 30 + name_length + extra_length
    if fields[:4] != LOCAL or file.read(name_length) != name.encode():
        raise ValueError(f"its member {reprlib.repr(name)} is not where the directory says")
    if begin + size > end:
        raise ValueError(f"its member {reprlib.repr(name)} would end at byte {begin + size} of {end}")
    return Member(begin, size)
