"""Folders and files damaged in numbered ways, some as by an attacker: `mutants(source, seed, target)`.

A mutation is chosen by the seed and by the kinds of files that there are: bytes, JSON, safetensors, GGUF, and the zip
archives of PyTorch.
"""

import io
import json
import re
import shutil
import struct
import warnings
import zipfile

import numpy as np
from malformed import spoil

DEEP = "[" * 5000 + "]" * 5000
HOSTILE = (
    *(None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**30, 10**400, 1.5, 1e308, float("nan"), float("-inf")),
    *("", "x", "../../../../etc/passwd", "/etc/passwd", "a\0b", "\ud800", "é" * 10, "9" * 5000, "x" * 10_000),
    *([], {}, [[]], [None] * 4, [0] * 10_000, {"a": {}}, ["../x"], [True, 1.5, "x"], {"r": -1}, [[0, "x", []]]),
)
CODE = b"\x80\x02cos\nsystem\nX\x07\0\0\0echo hi\x85R."
INSTRUCTIONS = (
    *(b"cos\nsystem\n", b"cbuiltins\nexec\n", b"ctorch\nload\n", b"R", b"b", b"Q", b"o", b"i", b"\x81", b"t", b"\x85"),
    *(b"h\xff", b"j\xff\xff\xff\x7f", b"r\xff\xff\xff\x7f", b"X\xff\xff\xff\xff", b"(" * 50_000, b")" * 50_000, b"0"),
    *(b"J\xff\xff\xff\xff", b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"K\x00", b"N", b"}", b"s", b"u", b".", b"\x94"),
)
SIZES = (0, 1, 2**16, 2**31, 2**32 - 1, 2**32 - 2)


class Draw:
    """Random choices of one mutation."""

    def __init__(self, seed):
        self.random, self.seed = np.random.default_rng(seed), seed

    def number(self, stop):
        return int(self.random.integers(stop))

    def pick(self, among):
        return among[self.number(len(among))]


def mutants(source, seed, target):
    """Copy a file or folder to `target` and damage it; returns what was done, in words."""
    draw = Draw(seed)
    if source.is_file():
        shutil.copyfile(source, target)
        files = [target]
    else:
        shutil.copytree(source, target)
        files = sorted(path for path in target.rglob("*") if path.is_file())
    path = draw.pick(files)
    ways = [*BYTES, *BY_ENDING.get(path.suffix, ())]
    # What depends on the kind of file is most of it.
    special = BY_ENDING.get(path.suffix) and draw.random.random() < 0.75
    way = draw.pick(BY_ENDING[path.suffix] if special else ways)
    return f"{path.name}: {way(path, draw)}"


def flip(path, draw):
    """Replace a few bytes."""
    data = bytearray(path.read_bytes())
    spots = [draw.number(max(len(data), 1)) for _ in range(1 + draw.number(6))]
    for spot in spots:
        data[spot : spot + 1] = bytes([draw.number(256)])
    path.write_bytes(data)
    return f"bytes {spots} replaced"


def cut(path, draw):
    """Cut the end off."""
    data = path.read_bytes()
    keep = draw.number(len(data) + 1)
    path.write_bytes(data[:keep])
    return f"cut after {keep} bytes"


def lengthen(path, draw):
    """Add bytes at the end, or in the middle."""
    data, more = path.read_bytes(), draw.random.bytes(1 + draw.number(200))
    at = draw.pick([len(data), draw.number(len(data) + 1)])
    path.write_bytes(data[:at] + more + data[at:])
    return f"{len(more)} bytes added at {at}"


def replace(path, draw):
    """Put something else in its place: nothing, an empty file, a folder, another kind of file."""
    path.unlink()
    kind = draw.pick(["nothing", "an empty file", "a folder", "zeros", "a list", "a pickle"])
    if kind == "a folder":
        path.mkdir()
    elif kind != "nothing":
        path.write_bytes({"an empty file": b"", "zeros": bytes(1000), "a list": b"[1]", "a pickle": CODE}[kind])
    return f"{kind} in its place"


def json_value(path, draw):
    """Replace a value of a JSON file, at any depth."""
    data = json.loads(path.read_text())
    places = list(_places(data))
    if not places:
        return "no value to replace"
    holder, key = draw.pick(places)
    holder[key] = draw.pick(HOSTILE)
    _write_json(path, data)
    return f"{key!r} = {str(holder[key])[:60]!r}"


def json_key(path, draw):
    """Remove, rename, repeat or add a key."""
    data = json.loads(path.read_text())
    holders = [holder for holder, key in _places(data) if isinstance(holder, dict)]
    if not holders:
        return "no key to change"
    holder = draw.pick(holders)
    key, way = draw.pick(sorted(holder)), draw.pick(["removed", "renamed", "added"])
    if way != "added":
        value = holder.pop(key)
    if way != "removed":
        holder[draw.pick(["", "../x", f"{key}x", key.upper(), "\ud800"])] = draw.pick([*HOSTILE, "value"])
        if way == "renamed":
            holder[f"{key}_"] = value
    _write_json(path, data)
    return f"{key!r} {way}"


def json_text(path, draw):
    """Replace the text by JSON that is hard to parse."""
    text = draw.pick(["{", DEEP, '{"a":' * 5000, '{"a": ' + DEEP + "}", "null", "3", '"x"', "[]", "{}", "9" * 9000])
    path.write_text(text)
    return f"text {text[:20]!r}"


def _places(data):
    """Every (object or list, key) in a JSON value."""
    if isinstance(data, dict | list):
        for key, value in list(data.items() if isinstance(data, dict) else enumerate(data)):
            yield data, key
            yield from _places(value)


def _write_json(path, data):
    path.write_bytes(json.dumps(data).encode("utf-8", "surrogatepass"))


def safetensors_entry(path, draw):
    """Damage a safetensors header, as the tests of whole models do."""
    data, what = spoil(path.read_bytes(), "safetensors", draw.seed)
    path.write_bytes(data)
    return what


def safetensors_header(path, draw):
    """Rename a tensor, swap two, or let the header claim 100 GB."""
    data = path.read_bytes()
    length = struct.unpack_from("<Q", data)[0]
    header = json.loads(data[8 : 8 + length])
    name, other = draw.pick(sorted(header)), draw.pick(sorted(header))
    way = draw.pick(["renamed", "swapped", "huge", "long header", "removed"])
    if way == "renamed":
        header[draw.pick(["../x", "", f"{name}x", name.replace("0", "99999999999999999999")])] = header.pop(name)
    elif way == "swapped":
        header[name], header[other] = header[other], header[name]
    elif way == "removed":
        del header[name]
    elif way == "huge" and "shape" in (header[name] or {}):
        header[name] |= {"shape": [25 * 10**9], "data_offsets": [0, 10**11]}
    text = json.dumps(header).encode()
    claim = draw.pick([10**11, 2**63, 2**64 - 1, 99_999_999]) if way == "long header" else len(text)
    path.write_bytes(struct.pack("<Q", claim) + text + data[8 + length :])
    return f"{name!r} {way}"


def gguf_field(path, draw):
    """Damage a GGUF header, as the tests of whole models do."""
    data, what = spoil(path.read_bytes(), "gguf", draw.seed)
    path.write_bytes(data)
    return what


def zip_member(path, draw):
    """Write the archive again with a member that was changed."""
    if not zipfile.is_zipfile(path):
        return flip(path, draw)
    with zipfile.ZipFile(path) as file:
        members = [(info.filename, file.read(info)) for info in file.infolist()]
    at = draw.number(len(members))
    name, data = members[at]
    way = draw.pick(["removed", "twice", "elsewhere", "cut", "longer", "flipped", "big endian", "compressed"])
    folder = name.split("/")[0]
    if way == "removed":
        del members[at]
    elif way == "twice":
        members.append((name, draw.pick([data, b"", CODE])))
    elif way == "elsewhere":
        names = [f"../{name}", f"/{name}", f"{folder}/../../x", f"x/{name}", name.upper(), "\\x"]
        members[at] = (draw.pick(names), data)
    elif way in ("cut", "longer"):
        members[at] = (name, data[: draw.number(len(data) + 1)] if way == "cut" else data + bytes(1 + draw.number(9)))
    elif way == "flipped":
        spot = draw.number(max(len(data), 1))
        members[at] = (name, data[:spot] + bytes([draw.number(256)]) + data[spot + 1 :])
    elif way == "big endian":
        members.append((f"{folder}/byteorder", b"big"))
    _write_zip(path, members, zipfile.ZIP_DEFLATED if way == "compressed" else zipfile.ZIP_STORED)
    return f"member {name} {way}"


def zip_pickle(path, draw):
    """Write the archive again with an instruction put into its pickle, or another pickle."""
    if not zipfile.is_zipfile(path):
        return flip(path, draw)
    with zipfile.ZipFile(path) as file:
        members = [(info.filename, file.read(info)) for info in file.infolist()]
    at = next(i for i, (name, _) in enumerate(members) if name.endswith("data.pkl"))
    name, data = members[at]
    spot, way = draw.number(len(data)), draw.pick(["put in", "put in place", "numbers", "code"])
    instruction = draw.pick(INSTRUCTIONS)
    if way == "numbers":  # of one byte: shapes, strides, offsets, counts
        spots = [i for i in range(len(data) - 1) if data[i : i + 1] == b"K"]
        spot, instruction = draw.pick(spots) if spots else spot, draw.pick([b"K\xff", b"K\0", b"K\x01", b"K\x40"])
    after = spot + (0 if way == "put in" else len(instruction))
    changed = CODE if way == "code" else data[:spot] + instruction + data[after:]
    members[at] = (name, changed)
    _write_zip(path, members)
    return f"{instruction[:20]!r} {way} at {spot} of {name}"


def zip_directory(path, draw):
    """Replace a number of the archive's directory."""
    data = bytearray(path.read_bytes())
    marks = [found.start() for found in re.finditer(rb"PK(\x01\x02|\x03\x04|\x05\x06)", bytes(data))]
    at = (draw.pick(marks) if marks else 0) + draw.pick([8, 10, 12, 16, 20, 24, 26, 28, 30, 42])
    data[at : at + 4] = struct.pack("<I", draw.pick(SIZES))
    path.write_bytes(data)
    return f"a number at {at} of the directory"


def _write_zip(path, members, compression=zipfile.ZIP_STORED):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a member that is given twice
        for name, data in members:
            file.writestr(name, data)
    path.write_bytes(out.getvalue())


BYTES = (flip, flip, cut, lengthen, replace)
TORCH = (zip_member, zip_pickle, zip_directory)
BY_ENDING = {
    ".json": (json_value, json_value, json_value, json_key, json_text),
    ".safetensors": (safetensors_entry, safetensors_header),
    ".gguf": (gguf_field,),
    ".bin": TORCH,
    ".pt": TORCH,
}
"""Mutations by the ending of a file."""
