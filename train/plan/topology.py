"""Topologies that can be planned for: their chips, and the names that slices are sold under."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

from train.devices.chips import Chip as Figures
from train.devices.chips import chip_of

_HERE = Path(__file__).parent
SOLD = next(p for p in (_HERE / "topologies.txt", _HERE.parents[1] / "tpu_scripts" / "topologies.txt") if p.is_file())
"""The table of slices: in this package where it is installed, beside the scripts in a clone."""
GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """An accelerator that can be planned for.

    memory   bytes that a program may use: what the compiler allows on TPUs; on GPUs the three quarters that JAX takes
             unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise
    figures  published ones
    """

    name: str
    platform: Literal["tpu", "gpu"]
    memory: float
    figures: Figures

    @property
    def flops(self) -> float:
        """bf16 FLOP/s, dense."""
        return self.figures.flops

    @property
    def bandwidth(self) -> float:
        """Of the memory, bytes/s."""
        return self.figures.bandwidth

    @property
    def network(self) -> float:
        """Bytes/s that it can send to its neighbours, all links together, one way."""
        return self.figures.network


def _chip(name: str, platform: Literal["tpu", "gpu"], memory: float, kind: str) -> Chip:
    figures = chip_of(kind)
    assert figures is not None
    return Chip(name, platform, memory, figures)


CHIPS = {
    chip.name: chip
    for chip in (
        _chip("v5e", "tpu", 15.75 * GIB, "TPU v5 lite"),
        _chip("v5p", "tpu", 95.74 * GIB, "TPU v5"),
        _chip("v6e", "tpu", 31.25 * GIB, "TPU v6 lite"),
        _chip("h100", "gpu", 0.75 * 80 * GIB, "NVIDIA H100 80GB HBM3"),
        _chip("h200", "gpu", 0.75 * 141 * GIB, "NVIDIA H200"),
    )
}


@dataclass(frozen=True)
class Topology:
    """Chips that are connected: one or several slices of a TPU, or the GPUs of one node.

    name    as the compiler writes it ("v5e:4x4"), or "h100:8"
    sold    what to ask a cloud for ("v5litepod-16"); the name itself for GPUs
    chips   in all slices
    """

    name: str
    chip: Chip
    chips: int
    sold: str
    slices: int = 1

    def __str__(self) -> str:
        """As in "v5e:4x4 (16 chips, sold as v5litepod-16)"."""
        many = f"{self.slices} x " if self.slices > 1 else ""
        sold = f", sold as {many}{self.sold}" if self.sold != self.name else ""
        return f"{many}{self.name} ({self.chips} chips{sold})"


def sold_names() -> dict[str, str]:
    """The topologies that can be had: the compiler's name -> the name that they are sold under."""
    lines = [line.split() for line in SOLD.read_text().splitlines() if line and not line.startswith("#")]
    return {line[0]: line[1] for line in lines}


def parse_topology(text: str, slices: int = 1) -> Topology:
    """Read "v5e:4x4" or "h100:8".

    Raises:
        ValueError: an unknown chip or shape; says which there are.
    """
    kind, _, shape = text.partition(":")
    if kind not in CHIPS:
        raise ValueError(
            f"topology {text!r}: unknown chip {kind!r}; known are {', '.join(CHIPS)}, as in v5e:4x4, h100:8"
        )
    if slices < 1:
        raise ValueError(f"slices: at least 1, got {slices}")
    chip = CHIPS[kind]
    if chip.platform == "gpu":
        if not shape.isdigit() or not 1 <= int(shape) <= 8:
            raise ValueError(f"topology {text!r}: for GPUs give their number in one node, 1 to 8, as in {kind}:8")
        if slices > 1:
            raise ValueError(f"topology {text!r}: several slices are of TPUs; GPUs are planned for one node")
        return Topology(text, chip, int(shape), text)
    names = sold_names()
    if text not in names:
        near = difflib.get_close_matches(text, names, n=1) or [""]
        own = [name for name in names if name.startswith(f"{kind}:")]
        hint = f" (did you mean {near[0]}?)" if near[0] else ""
        raise ValueError(f"topology {text!r}: no such slice{hint}; of {kind} there are {', '.join(own)}")
    return Topology(text, chip, slices * prod(int(n) for n in shape.split("x")), names[text], slices)
