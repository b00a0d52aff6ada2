"""Files damaged in numbered ways, and readers of their formats that are independent of the library."""

import json
import signal
import struct
from contextlib import contextmanager
from functools import cache

import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16}
PLAIN = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
OF_A_TENSOR = ("shape of", "offset of", "type of a tensor", "entry")  # damage whose error must name the tensor
HARD = (0, 1, 2, 7, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


@contextmanager
def working_time(seconds):
    """Raise TimeoutError in what takes more CPU time than this."""

    def stop(*_):
        raise TimeoutError(f"{seconds} s of work")

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def read_safetensors(data):
    """{name: array} of a safetensors file."""
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    out = {}
    for name, entry in header.items():
        begin, end = (8 + length + at for at in entry["data_offsets"])
        kind = np.dtype(TYPES.get(entry["dtype"], np.uint8))
        out[name] = np.frombuffer(data[begin:end], kind)
        if entry["dtype"] in TYPES:
            out[name] = out[name].reshape(entry["shape"])
    return out


class Reader:
    """Reads a GGUF file's header and records the position of every number."""

    def __init__(self, data):
        self.data, self.at, self.spots = data, 0, []

    def number(self, form, what):
        size = struct.calcsize("<" + form)
        self.spots.append((what, self.at, form))
        (value,) = struct.unpack_from("<" + form, self.data, self.at)
        self.at += size
        return value

    def text(self, what):
        length = self.number("Q", f"length of {what}")
        self.at += length
        return self.data[self.at - length : self.at].decode("utf-8", "surrogateescape")

    def value(self, kind, what):
        if kind == 8:
            return self.text(what)
        if kind == 9:
            inner, count = self.number("I", f"type in {what}"), self.number("Q", f"count of {what}")
            return [self.value(inner, what) for _ in range(count)]
        return self.number(FORMS[kind], what)


def read_gguf(data):
    """(metadata, {name: array}, spots) of a GGUF file, a spot being (what, offset, form) of a number in the header."""
    reader = Reader(data)
    reader.number("I", "magic")
    reader.number("I", "version")
    tensors, pairs = reader.number("Q", "count of tensors"), reader.number("Q", "count of pairs")
    metadata = {}
    for _ in range(pairs):
        key = reader.text("a key")
        metadata[key] = reader.value(reader.number("I", f"type of {key}"), key)
    infos = []
    for _ in range(tensors):
        name = reader.text("a tensor's name")
        dims = reader.number("I", f"axes of {name}")
        shape = [reader.number("Q", f"shape of {name}") for _ in range(dims)][::-1]
        infos.append(
            (name, shape, reader.number("I", f"type of a tensor, {name}"), reader.number("Q", f"offset of {name}"))
        )
    alignment = metadata.get("general.alignment", 32)
    start = (reader.at + alignment - 1) // alignment * alignment
    out = {}
    for name, shape, code, offset in infos:
        kind = GGMLQuantizationType(code)
        block, width = GGML_QUANT_SIZES[kind]
        raw = data[start + offset :][: int(np.prod(shape)) // block * width]
        if kind.name in PLAIN:
            out[name] = np.frombuffer(raw, PLAIN[kind.name]).reshape(shape)
        else:
            rows = np.frombuffer(raw, np.uint8).reshape(*shape[:-1], shape[-1] // block * width)
            try:
                out[name] = dequantize(rows, kind)
            except NotImplementedError:
                out[name] = rows
    return metadata, out, reader.spots


@cache
def numbers_in(data):
    """The numbers in a GGUF header: (what, offset, struct format)."""
    return read_gguf(data)[2]


@cache
def names_in(data, form):
    """The tensors' names."""
    return list(read_gguf(data)[1] if form == "gguf" else read_safetensors(data))


def header_end(data, form):
    """About where the tensors' bytes begin."""
    if form == "gguf":
        return max(at for _, at, _ in numbers_in(data)) + 8
    return 8 + struct.unpack_from("<Q", data)[0]


def spoil(data, form, number):
    """(damaged file, what was done to it), a function of the number."""
    draw = np.random.default_rng([len(form), number])
    end, way = header_end(data, form), number % 8
    pick = lambda among: among[int(draw.integers(len(among)))]
    at = int(draw.integers(end))
    if way == 0:
        keep = int(draw.integers(len(data))) if draw.random() < 0.5 else at
        return data[:keep], f"cut after {keep} bytes"
    if way == 1:
        out, spots = bytearray(data), draw.integers(0, end, draw.integers(1, 5))
        for spot in spots:
            out[spot] = int(draw.integers(256))
        return bytes(out), f"header bytes {spots.tolist()} replaced"
    if way == 2:
        size, value = pick([1, 2, 4, 8]), pick(HARD)
        out = data[:at] + (value % 256**size).to_bytes(size, "little") + data[at + size :]
        return out, f"{value} in {size} bytes at {at}"
    if way == 3:
        size = int(draw.integers(1, 64))
        how = pick(["removed", "doubled", "put elsewhere"])
        part, to = data[at : at + size], int(draw.integers(end))
        gone = data[:at] + data[at + size :]
        out = {"removed": gone, "doubled": data[:at] + part + data[at:], "put elsewhere": gone[:to] + part + gone[to:]}
        return out[how], f"{size} bytes at {at} {how}"
    if way == 4:
        out, spots = bytearray(data), draw.integers(end, len(data), draw.integers(1, 5))
        for spot in spots:
            out[spot] = int(draw.integers(256))
        return bytes(out), f"data bytes {spots.tolist()} replaced"
    if way == 5 and draw.random() < 0.3:
        return data + bytes(draw.integers(0, 256, draw.integers(1, 100), dtype=np.uint8)), "bytes added at the end"
    return (spoil_numbers if form == "gguf" else spoil_entries)(data, draw, pick)


def spoil_config(raw, number):
    """(a config.json with one field changed or added, what was done)."""
    draw = np.random.default_rng(number)
    pick = lambda among: among[int(draw.integers(len(among)))]
    raw = json.loads(json.dumps(raw))
    inner = [value for value in raw.values() if isinstance(value, dict)]
    place = pick(inner) if inner and draw.random() < 0.2 else raw
    name = pick([*place, "rope_scaling", "layer_types", "sliding_window", "no_rope_layers", "rope_theta"])
    odd = [None, True, False, -1, 0, 1, 3, 1.5, "x", "", [], {}, [[2]], [None] * 4, {"a": {}}, 10**9, 10**30]
    odd += [float("nan"), float("inf"), "\ud800", {"rope_type": "linear"}, {"rope_type": []}, ["full_attention"] * 4]
    place[name] = pick(odd)
    return raw, f"{name}: {place[name]!r}"


def spoil_numbers(data, draw, pick):
    """Change one number of a GGUF header, most often a length, a count, a type or an offset."""
    spots = numbers_in(data)
    telling = [spot for spot in spots if " of " in spot[0] or spot[0].startswith(("axes", "type"))]
    keys = [spot for spot in spots if spot[0].startswith(("llama.", "gemma3."))] or telling
    what, at, form = pick(telling if draw.random() < 0.6 else keys)
    size = struct.calcsize("<" + form)
    (old,) = struct.unpack_from("<" + {1: "B", 2: "H", 4: "I", 8: "Q"}[size], data, at)
    new = pick([*HARD, old + 1, old - 1, old * 2, old + 32, old - 32, int(draw.integers(16)), int(draw.integers(64))])
    out = data[:at] + (new % 256**size).to_bytes(size, "little") + data[at + size :]
    return out, f"{what} at {at}: {old} -> {new % 256**size}"


def spoil_entries(data, draw, pick):
    """Change one field of one entry of a safetensors header, which remains JSON of the stated length."""
    length = struct.unpack_from("<Q", data)[0]
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    name, other = pick(names), pick(names)
    entry = header[name]
    odd = pick([None, True, -1, 1.5, "F32", [], {}, [[2]], *HARD, 10**30])
    way = int(draw.integers(8))
    if way == 0:
        entry["dtype"] = pick([*TYPES, "I8", "U8", "I32", "BOOL", "F8_E4M3", "F4", odd])
    elif way == 1:
        entry["shape"] = pick([entry["shape"][::-1], [*entry["shape"], 1], entry["shape"][1:], [1] * 64, odd])
    elif way == 2:
        entry["shape"][int(draw.integers(len(entry["shape"])))] = odd
    elif way == 3:
        entry["data_offsets"][int(draw.integers(2))] = odd
    elif way == 4:
        entry["data_offsets"] = pick([header[other]["data_offsets"], entry["data_offsets"][::-1], [0], [0, 0, 0], odd])
    elif way == 5:
        header[name], header[other] = header[other], header[name]
    elif way == 6:
        del entry[pick(list(entry))]
    else:
        header[pick([f"{name}x", "", "__metadata__", "\ud800"])] = pick([header.pop(name), odd])
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[
        8 + length :
    ], f"{'header' if way == 7 else 'entry'} {name}: {way}, {odd!r}, {other}"
