"""Collectives of a compiled program, read from its text: by kind, how often they run and how much they move.

A loop's body counts as often as the loop runs. That is in the text where the compiler knew it; otherwise it follows
from the loop's condition (counter < constant), the counter's start and its step.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from math import ceil, prod

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

WIDTHS = {"pred": 1, "bf16": 2, "token": 0}
"""Bytes of an element whose type's name does not end in its bits."""


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in one run of a program.

    count   times that they run
    bytes   of their results, on one device
    sent    bytes that one device sends, by a ring or its like
    """

    count: int = 0
    bytes: int = 0
    sent: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        """One after the other."""
        return Traffic(self.count + other.count, self.bytes + other.bytes, self.sent + other.sent)

    def __mul__(self, times: int) -> Traffic:
        """Repeated."""
        return Traffic(self.count * times, self.bytes * times, self.sent * times)


@dataclass(frozen=True)
class Instruction:
    """A line of the text: name = shape opcode(operands), attributes."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    inside: str
    attributes: str


Computation = dict[str, Instruction]
"""By name, in order; the root under "ROOT" as well."""

Collectives = dict[str, Traffic]


def collectives(text: str, other_trips: int = 1) -> Collectives:
    """Count the collectives of a compiled program.

    Args:
        text: of the optimised module, `compiled.as_text()`.
        other_trips: how often a loop runs whose end depends on data.
    """
    computations, entry = parse(text)

    @cache
    def of(name: str) -> tuple[tuple[str, Traffic], ...]:
        total: Collectives = {}
        for key, each in computations[name].items():
            if key == "ROOT":
                continue
            kind = each.opcode.removesuffix("-start")
            if kind in KINDS:
                _add(total, {kind: _traffic(kind, each)})
            elif each.opcode == "while":
                trips = trip_count(each, computations[name], computations)
                for part in ("body", "condition"):
                    _add(total, dict(of(_attribute(each, part))), other_trips if trips is None else trips)
            elif each.opcode == "conditional":  # the costliest branch
                branches = [dict(of(branch)) for branch in _branches(each)]
                _add(total, max(branches, key=lambda found: sum(t.sent for t in found.values())))
            elif each.opcode in ("fusion", "call", "async-start"):
                for called in re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", each.attributes):
                    _add(total, dict(of(called)))
        return tuple(total.items())

    return dict(sorted(of(entry)))


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """All computations of a module, and the entry's name."""
    found: dict[str, Computation] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = found.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif body := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)", line):
            instruction = _instruction(body[2], re.sub(r"/\*.*?\*/", "", body[3]))
            current[instruction.name] = instruction
            if body[1]:
                current["ROOT"] = instruction
    return found, entry


def _instruction(name: str, text: str) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    shape, rest = text[:end], text[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name, shape, rest[:opening], operands, inside, rest[closing + 1 :])


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis at `opening` closes."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    raise ValueError(f"HLO text: a parenthesis does not close in {text[:80]!r}")


def trip_count(loop: Instruction, around: Computation, computations: dict[str, Computation]) -> int | None:
    """How often a `while` runs; None where that depends on data."""
    if known := re.search(r'known_trip_count"?:\s*\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    condition, body = computations[_attribute(loop, "condition")], computations[_attribute(loop, "body")]
    bound = _bound(condition, computations)
    if bound is None:
        return None
    index, stop = bound
    start = _element(around, loop.operands[0], index)
    after = _through_copies(body, body["ROOT"].operands[index])
    added = [_constant(body, name) for name in after.operands] if after.opcode == "add" else []
    step = next((value for value in added if value), 1)
    return max(0, ceil((stop - (start or 0)) / step))


def _bound(condition: Computation, computations: dict[str, Computation]) -> tuple[int, int] | None:
    """(element of the carry, constant) of a condition "element < constant"; None for any other."""
    root, values = condition["ROOT"], condition
    names = root.operands
    if root.opcode == "fusion":  # the comparison may be wrapped: its parameters are the fusion's operands
        inner = computations[_attribute(root, "calls")]
        outer = {e.name: names[int(e.inside)] for e in inner.values() if e.opcode == "parameter"}
        root, values = inner["ROOT"], {**condition, **inner}
        names = tuple(outer.get(name, name) for name in root.operands)
    if root.opcode != "compare" or "direction=LT" not in root.attributes:
        return None
    counter, stop = _through_copies(values, names[0]), _constant(values, names[1])
    index = re.search(r"index=(\d+)", counter.attributes)
    return None if stop is None or index is None else (int(index[1]), stop)


def _through_copies(values: Computation, name: str) -> Instruction:
    found = values[name]
    while found.opcode in ("copy", "bitcast") and found.operands:
        found = values[found.operands[0]]
    return found


def _constant(values: Computation, name: str) -> int | None:
    found = _through_copies(values, name)
    return int(found.inside) if found.opcode == "constant" and re.fullmatch(r"-?\d+", found.inside) else None


def _element(values: Computation, name: str, index: int) -> int | None:
    """The constant at an index of a tuple."""
    made = values[name]
    return _constant(values, made.operands[index]) if made.opcode == "tuple" else None


def _attribute(each: Instruction, name: str) -> str:
    found = re.search(rf"\b{name}=%?([\w.\-]+)", each.attributes)
    assert found, (each.name, name)
    return found[1]


def _branches(each: Instruction) -> list[str]:
    if listed := re.search(r"branch_computations=\{(.*?)\}", each.attributes):
        return re.findall(r"%?([\w.\-]+)", listed[1])
    return [_attribute(each, "true_computation"), _attribute(each, "false_computation")]


def _add(total: Collectives, more: Collectives, times: int = 1) -> None:
    for kind, traffic in more.items():
        total[kind] = total.get(kind, Traffic()) + traffic * times


def _traffic(kind: str, each: Instruction) -> Traffic:
    """One run of a collective. A -start form returns (operands, results, ...)."""
    shape = each.shape
    if each.opcode.endswith("-start") and shape.startswith("("):
        shape = _elements(shape)[1] if len(_elements(shape)) > 1 else shape
    size, n = shape_bytes(shape), group_size(each.attributes)
    share = (n - 1) / n if n else 1.0
    sent = {
        "all-gather": size * share,
        "all-reduce": 2 * size * share,
        "reduce-scatter": size * max(0, n - 1),
        "all-to-all": size * share,
        "collective-permute": size,
    }
    return Traffic(1, size, int(sent[kind]))


def _elements(shape: str) -> list[str]:
    """The members of a tuple's shape, nested tuples whole."""
    parts, depth = [""], 0
    for char in shape[1:-1]:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and not depth:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def shape_bytes(shape: str) -> int:
    """Size of a shape such as "bf16[4,2048]{1,0}", or of a tuple of them."""
    total = 0
    for dtype, dims in re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", shape):
        bits = re.search(r"\d+", dtype)
        width = WIDTHS.get(dtype, int(bits[0]) // 8 if bits else 4)
        total += width * prod(int(size) for size in dims.split(",") if size)
    return total


def group_size(attributes: str) -> int:
    """Devices that take part in one group of a collective; 0 where the text does not say."""
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
        return int(iota[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(listed[1].split(","))
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\]\s*\{(.*?)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        taken = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return prod(int(part) if part else sizes[name] for name, part in taken)
    return 0
