"""Topologies that the fit check knows: their chips, and the names under which clouds sell them."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

from jaxsteer.plans import did_you_mean
from train.devices.chips import Chip as Published
from train.devices.chips import chip_of

_HERE = Path(__file__).parent
SOLD = next(p for p in (_HERE / "topologies.txt", _HERE.parents[1] / "tpu_scripts" / "topologies.txt") if p.is_file())
"""The table of slices: in this package where it is installed, beside the scripts in a clone."""
GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """An accelerator that the fit check knows.

    memory     bytes that a program may use: on TPUs the compiler's limit; on GPUs the three quarters that JAX reserves
               unless XLA_PYTHON_CLIENT_MEM_FRACTION is set
    published  the vendor's figures
    """

    name: str
    platform: Literal["tpu", "gpu"]
    memory: float
    published: Published

    @property
    def flops(self) -> float:
        """Peak dense bf16 FLOP/s."""
        return self.published.flops

    @property
    def bandwidth(self) -> float:
        """Memory bandwidth, bytes/s."""
        return self.published.bandwidth

    @property
    def network(self) -> float:
        """Bandwidth to other chips, all links together, one way, bytes/s."""
        return self.published.network


def _chip(name: str, platform: Literal["tpu", "gpu"], memory: float, kind: str) -> Chip:
    published = chip_of(kind)
    assert published is not None
    return Chip(name, platform, memory, published)


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
    """Connected chips: one or more slices of a TPU, or the GPUs of one node.

    name    as the compiler writes it ("v5e:4x4"), or "h100:8"
    chips   number of chips in all slices
    sold    accelerator type to request from a cloud ("v5litepod-16"); for GPUs, the name itself
    """

    name: str
    chip: Chip
    chips: int
    sold: str
    slices: int = 1

    def __str__(self) -> str:
        """E.g. "v5e:4x4 (16 chips, sold as v5litepod-16)"."""
        slices = f"{self.slices} x " if self.slices > 1 else ""
        sold = f", sold as {slices}{self.sold}" if self.sold != self.name else ""
        return f"{slices}{self.name} ({self.chips} chips{sold})"


def sold_names() -> dict[str, str]:
    """The TPU topologies that clouds sell: the compiler's name -> accelerator type."""
    rows = [line.split() for line in SOLD.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    return {row[0]: row[1] for row in rows}


def compiler_name(text: str) -> str:
    """The compiler's name of a slice: "v5e:4x4" for itself, and for v5litepod-16, v5lite-16, v5e-16 and V5E:4x4.

    The number is the cloud's: of chips for v5e and v6e, of cores, two per chip, for v5p and v4. Other texts are
    returned in lower case.
    """
    name = text.strip().lower()
    sold = {sold.lower(): topology for topology, sold in sold_names().items()}
    for prefix in ("v5lite-", "v5e-"):
        if name.startswith(prefix):
            name = name.replace(prefix, "v5litepod-")
    return sold.get(name, name)


def parse_topology(text: str, slices: int = 1) -> Topology:
    """Parse "v5e:4x4", the name it is sold under ("v5litepod-16"), or "h100:8".

    Raises:
        ValueError: an unknown chip or shape; the message lists the known ones.
    """
    asked, text = text, compiler_name(text)
    kind, _, shape = text.partition(":")
    if kind not in CHIPS:
        every = [*sold_names(), *sold_names().values(), *(f"{name}:8" for name in CHIPS)]
        what = f"the fit check does not know {kind} chips" if text in sold_names() else f"unknown chip {kind!r}"
        hint = "" if text in sold_names() else did_you_mean(text, every)
        raise ValueError(f"topology {asked!r}: {what}{hint}; known: {', '.join(CHIPS)}, as in v5e:4x4, h100:8")
    if slices < 1:
        raise ValueError(f"slices: must be at least 1, got {slices}")
    chip = CHIPS[kind]
    if chip.platform == "gpu":
        if not shape.isdigit() or not 1 <= int(shape) <= 8:
            raise ValueError(f"topology {text!r}: give the number of GPUs in one node, 1 to 8, as in {kind}:8")
        if slices > 1:
            raise ValueError(f"topology {text!r}: only TPUs have slices; GPUs are checked on one node")
        return Topology(text, chip, int(shape), text)
    names = sold_names()
    if text not in names:
        known = [name for name in names if name.startswith(f"{kind}:")]
        hint = did_you_mean(text, known)
        raise ValueError(f"topology {asked!r}: no such slice{hint}; known for {kind}: {', '.join(known)}")
    return Topology(text, chip, slices * prod(int(side) for side in shape.split("x")), names[text], slices)
