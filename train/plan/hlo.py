"""Collectives of a compiled step, read from its HLO text: by kind, how often they run and how many bytes they send.

A loop's body is counted as often as the loop runs. The text gives the trip count where the compiler knew it; otherwise
it follows from the loop's condition (counter < constant) and the counter's start and step.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from math import ceil, prod

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

WIDTHS = {"pred": 1, "bf16": 2, "token": 0}
"""Bytes per element of types whose name does not end in their number of bits."""


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in one run of a compiled step.

    count   number of executions
    bytes   size of their results on one device
    sent    bytes that one device sends, with ring algorithms
    """

    count: int = 0
    bytes: int = 0
    sent: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        """Both, one after the other."""
        return Traffic(self.count + other.count, self.bytes + other.bytes, self.sent + other.sent)

    def __mul__(self, times: int) -> Traffic:
        """Repeated."""
        return Traffic(self.count * times, self.bytes * times, self.sent * times)


@dataclass(frozen=True)
class Instruction:
    """One line of HLO text: name = shape opcode(operands), attributes. `inside` is the text between the parentheses."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    inside: str
    attributes: str


Computation = dict[str, Instruction]
"""Instructions by name, in order; the root is also under "ROOT"."""

Collectives = dict[str, Traffic]
"""Traffic by kind of collective."""


def collectives(text: str, unknown_trips: int = 1) -> Collectives:
    """Count the collectives of a compiled step.

    Args:
        text: the optimised module, `compiled.as_text()`.
        unknown_trips: trip count to assume for loops whose end depends on data.
    """
    computations, entry = parse(text)

    @cache
    def within(name: str) -> tuple[tuple[str, Traffic], ...]:
        computation = computations[name]
        total: Collectives = {}
        for key, instruction in computation.items():
            if key == "ROOT":
                continue
            kind = instruction.opcode.removesuffix("-start")
            if kind in KINDS:
                _add(total, {kind: _traffic(kind, instruction)})
            elif instruction.opcode == "while":
                trips = trip_count(instruction, computation, computations)
                for part in ("body", "condition"):
                    _add(total, dict(within(_attribute(instruction, part))), unknown_trips if trips is None else trips)
            elif instruction.opcode == "conditional":  # the most expensive branch
                branches = [dict(within(branch)) for branch in _branches(instruction)]
                _add(total, max(branches, key=lambda branch: sum(traffic.sent for traffic in branch.values())))
            elif instruction.opcode in ("fusion", "call", "async-start"):
                for called in re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", instruction.attributes):
                    _add(total, dict(within(called)))
        return tuple(total.items())

    return dict(sorted(within(entry)))


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """All computations of a module by name, and the name of the entry computation."""
    computations: dict[str, Computation] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif body := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)", line):
            instruction = _instruction(body[2], re.sub(r"/\*.*?\*/", "", body[3]))
            current[instruction.name] = instruction
            if body[1]:
                current["ROOT"] = instruction
    return computations, entry


def _instruction(name: str, text: str) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    shape, rest = text[:end], text[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name, shape, rest[:opening], operands, inside, rest[closing + 1 :])


def _closing(text: str, opening: int) -> int:
    """Index of the parenthesis that closes the one at `opening`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    raise ValueError(f"HLO text: unbalanced parenthesis in {text[:80]!r}")


def trip_count(loop: Instruction, caller: Computation, computations: dict[str, Computation]) -> int | None:
    """Trip count of a `while`; None if it depends on data."""
    if given := re.search(r'known_trip_count"?:\s*\{"n":"(\d+)"', loop.attributes):
        return int(given[1])
    condition, body = computations[_attribute(loop, "condition")], computations[_attribute(loop, "body")]
    bound = _bound(condition, computations)
    if bound is None:
        return None
    index, stop = bound
    start = _element(caller, loop.operands[0], index)
    update = _through_copies(body, body["ROOT"].operands[index])
    addends = [_constant(body, name) for name in update.operands] if update.opcode == "add" else []
    step = next((value for value in addends if value), 1)
    return max(0, ceil((stop - (start or 0)) / step))


def _bound(condition: Computation, computations: dict[str, Computation]) -> tuple[int, int] | None:
    """(index in the carry, constant) of a condition "carry[index] < constant"; None for any other condition."""
    root, values = condition["ROOT"], condition
    names = root.operands
    if root.opcode == "fusion":  # a wrapped comparison: its parameters are the fusion's operands
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
    """The instruction that computes a value, with copies and bitcasts skipped."""
    source = values[name]
    while source.opcode in ("copy", "bitcast") and source.operands:
        source = values[source.operands[0]]
    return source


def _constant(values: Computation, name: str) -> int | None:
    """The value of an integer constant; None for anything else."""
    source = _through_copies(values, name)
    return int(source.inside) if source.opcode == "constant" and re.fullmatch(r"-?\d+", source.inside) else None


def _element(values: Computation, name: str, index: int) -> int | None:
    """The integer constant at an index of a tuple; None for anything else."""
    source = values[name]
    return _constant(values, source.operands[index]) if source.opcode == "tuple" else None


def _attribute(instruction: Instruction, name: str) -> str:
    match = re.search(rf"\b{name}=%?([\w.\-]+)", instruction.attributes)
    assert match, (instruction.name, name)
    return match[1]


def _branches(instruction: Instruction) -> list[str]:
    if listed := re.search(r"branch_computations=\{(.*?)\}", instruction.attributes):
        return re.findall(r"%?([\w.\-]+)", listed[1])
    return [_attribute(instruction, "true_computation"), _attribute(instruction, "false_computation")]


def _add(total: Collectives, more: Collectives, times: int = 1) -> None:
    for kind, traffic in more.items():
        total[kind] = total.get(kind, Traffic()) + traffic * times


def _traffic(kind: str, instruction: Instruction) -> Traffic:
    """One execution of a collective. Its -start form returns (operands, results, ...)."""
    shape = instruction.shape
    if instruction.opcode.endswith("-start") and shape.startswith("("):
        shape = _elements(shape)[1] if len(_elements(shape)) > 1 else shape
    size, n = shape_bytes(shape), group_size(instruction.attributes)
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
    """The shapes in a tuple's shape; nested tuples stay whole."""
    parts, depth = [""], 0
    for char in shape[1:-1]:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and not depth:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def shape_bytes(shape: str) -> int:
    """Bytes of a shape such as "bf16[4,2048]{1,0}", or of a tuple of shapes."""
    total = 0
    for dtype, dims in re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", shape):
        bits = re.search(r"\d+", dtype)
        width = WIDTHS.get(dtype, int(bits[0]) // 8 if bits else 4)
        total += width * prod(int(size) for size in dims.split(",") if size)
    return total


def group_size(attributes: str) -> int:
    """Number of devices in one group of a collective; 0 if the text does not say."""
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
        return int(iota[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(listed[1].split(","))
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\]\s*\{(.*?)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        taken = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return prod(int(part) if part else sizes[name] for name, part in taken)
    return 0
