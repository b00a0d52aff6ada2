"""What a plan prints."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from train.display.console import print_facts
from train.plan.estimate import Roofline
from train.plan.figures import Figures
from train.plan.topology import GIB

NAMES = {"train": "training step", "decode": "decoding"}
CURVES = {"arithmetic": "arithmetic", "memory": "memory traffic", "network": "the network"}


def gib(size: float) -> str:
    """E.g. "4.53 GiB", "6.3 MiB"."""
    return f"{size / GIB:,.2f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.1f} MiB"


def verdict(found: Figures) -> str:
    """E.g. "fits: 4.53 of 15.75 GiB a chip"."""
    of = f"{found.needed / GIB:.2f} of {gib(found.limit)} a chip"
    if found.fits:
        return f"fits: {of}"
    return f"does not fit: needs {of}" if found.needed else f"does not fit in {gib(found.limit)} a chip"


def how(found: Figures) -> str:
    """Where the figures are from."""
    if found.compiled and not found.fits:
        return f"the compiler gave up after {found.compile_seconds:.0f} s"
    if found.compiled:
        return f"compiled in {found.compile_seconds:.0f} s"
    return "analytic estimate, not compiled"


def speed(found: Figures) -> str:
    """Time, throughput and utilisation at the roofline."""
    unit = "a step" if found.which == "train" else "for all tokens"
    return (
        f"{found.roofline.seconds:.3g} s {unit}, {found.tokens_per_second:,.0f} tokens/s, MFU {100 * found.mfu:.0f} %, "
        f"bound by {CURVES[found.roofline.bound]}"
    )


def times(line: Roofline) -> str:
    """What the roofline is made of."""
    return f"arithmetic {line.arithmetic:.3g} s, memory traffic {line.memory:.3g} s, network {line.network:.3g} s"


def print_figures(found: Figures) -> None:
    """One program: facts, then tables of memory and collectives."""
    console = Console()
    idle = f"; {found.topology.chips - found.used} of the chips idle" if found.used < found.topology.chips else ""
    console.print()
    print_facts(
        {
            NAMES[found.which]: f"{verdict(found)} ({how(found)})",
            "topology": f"{found.topology}; mesh {found.mesh}{idle}",
            "attention": f"{found.attention[0]} ({found.attention[1]})",
            "arithmetic": f"{found.flops.executed:.3g} FLOPs executed, {found.flops.useful:.3g} useful",
            "at best": speed(found),
            "at the peaks": times(found.roofline),
        }
    )
    if found.words:
        console.print(f"The compiler: {found.words}", style="dim", highlight=False, soft_wrap=True)
    if found.remedies:
        console.print("What would fit, by the analytic estimate:", highlight=False)
        for remedy in found.remedies:
            console.print(f"  {remedy}", highlight=False, soft_wrap=True)
    title = "Memory of a chip" if found.compiled and found.fits else "Memory of a chip, estimate"
    table = Table(title=title, title_justify="left")
    table.add_column("what")
    table.add_column("size", justify="right")
    for name, size in found.parts.items():
        table.add_row(name, gib(size))
    table.add_section()
    table.add_row("peak", gib(sum(found.parts.values())))
    console.print(table)
    if found.collectives:
        table = Table(title="Collectives of one run, on each chip", title_justify="left")
        for column in ("kind", "times", "results", "sent"):
            table.add_column(column, justify="left" if column == "kind" else "right")
        for kind, traffic in found.collectives.items():
            table.add_row(kind, f"{traffic.count:,}", gib(traffic.bytes), gib(traffic.sent))
        console.print(table)


def print_comparison(found: Sequence[Figures], settings: Sequence[str], title: str) -> None:
    """A line for each: topologies compared, or the settings of a search."""
    table = Table(title=title, title_justify="left")
    for column in ("topology", "settings", "peak a chip", "fits", "tokens/s", "MFU", "bound by", "from"):
        table.add_column(column, justify="right" if column in ("peak a chip", "tokens/s", "MFU") else "left")
    for each, setting in zip(found, settings, strict=True):
        table.add_row(
            f"{each.topology.name} = {each.topology.sold}"
            if each.topology.sold != each.topology.name
            else each.topology.name,
            setting,
            f"{each.needed / GIB:.2f} of {each.limit / GIB:.2f} GiB",
            "yes" if each.fits else "no",
            f"{each.tokens_per_second:,.0f}",
            f"{100 * each.mfu:.0f} %",
            CURVES[each.roofline.bound],
            "compiler" if each.compiled else "estimate",
        )
    Console().print(table)
