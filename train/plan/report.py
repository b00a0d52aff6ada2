"""What the fit check prints."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from train.display.console import print_facts
from train.plan.estimate import Roofline
from train.plan.figures import Figures
from train.plan.hlo import Collectives
from train.plan.topology import GIB

TITLES = {"train": "training step", "decode": "decoding"}
BOUNDS = {"arithmetic": "arithmetic", "memory": "memory traffic", "network": "network"}


def gib(size: float) -> str:
    """E.g. "4.53 GiB", "6.3 MiB"."""
    return f"{size / GIB:,.2f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.1f} MiB"


def verdict(figures: Figures) -> str:
    """E.g. "fits: 4.53 of 15.75 GiB per chip"."""
    share = f"{figures.needed / GIB:.2f} of {gib(figures.limit)} per chip"
    if figures.fits:
        return f"fits: {share}"
    return f"does not fit: needs {share}" if figures.needed else f"does not fit in {gib(figures.limit)} per chip"


def provenance(figures: Figures) -> str:
    """Where the figures come from."""
    if figures.compiled and not figures.fits:
        return f"the compiler gave up after {figures.compile_seconds:.0f} s"
    if figures.compiled:
        return f"compiled in {figures.compile_seconds:.0f} s"
    return "analytic estimate, not compiled"


def speed(figures: Figures) -> str:
    """Time, throughput and utilisation at the roofline."""
    unit = "per step" if figures.which == "train" else "for all tokens"
    return (
        f"{figures.roofline.seconds:.3g} s {unit}, {figures.tokens_per_second:,.0f} tokens/s, "
        f"MFU {100 * figures.mfu:.0f} %, bound by {BOUNDS[figures.roofline.bound]}"
    )


def times(bound: Roofline) -> str:
    """The three times that a roofline is the maximum of."""
    return f"arithmetic {bound.arithmetic:.3g} s, memory traffic {bound.memory:.3g} s, network {bound.network:.3g} s"


def print_figures(figures: Figures) -> None:
    """Print one compiled step: facts, then tables of memory and collectives."""
    console = Console()
    idle = figures.topology.chips - figures.used
    console.print()
    print_facts(
        {
            TITLES[figures.which]: f"{verdict(figures)} ({provenance(figures)})",
            "topology": f"{figures.topology}; mesh {figures.mesh}" + (f"; {idle} chips idle" if idle else ""),
            "attention": f"{figures.attention[0]} ({figures.attention[1]})",
            "arithmetic": f"{figures.flops.executed:.3g} FLOPs executed, {figures.flops.useful:.3g} useful",
            "at best": speed(figures),
            "roofline": times(figures.roofline),
        }
    )
    if figures.words:
        console.print(f"Compiler: {figures.words}", style="dim", highlight=False, soft_wrap=True)
    if figures.remedies:
        console.print("What would fit, by the analytic estimate:", highlight=False)
        for remedy in figures.remedies:
            console.print(f"  {remedy}", highlight=False, soft_wrap=True)
    console.print(_memory_table(figures))
    if figures.collectives:
        console.print(_collectives_table(figures.collectives))


def _memory_table(figures: Figures) -> Table:
    estimated = not (figures.compiled and figures.fits)
    table = Table(title="Memory per chip" + (", estimated" if estimated else ""), title_justify="left")
    table.add_column("part")
    table.add_column("size", justify="right")
    for name, size in figures.parts.items():
        table.add_row(name, gib(size))
    table.add_section()
    table.add_row("peak", gib(sum(figures.parts.values())))
    return table


def _collectives_table(collectives: Collectives) -> Table:
    table = Table(title="Collectives per run of the step, on each chip", title_justify="left")
    for column in ("kind", "count", "results", "sent"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for kind, traffic in collectives.items():
        table.add_row(kind, f"{traffic.count:,}", gib(traffic.bytes), gib(traffic.sent))
    return table


def print_comparison(rows: Sequence[tuple[str, Figures]], title: str) -> None:
    """Print a line per compiled step, to compare topologies or the settings of a search.

    Args:
        rows: (what was checked, figures).
        title: above the table.
    """
    table = Table(title=title, title_justify="left")
    for column in ("topology", "settings", "peak per chip", "fits", "tokens/s", "MFU", "bound by", "source"):
        table.add_column(column, justify="right" if column in ("peak per chip", "tokens/s", "MFU") else "left")
    for settings, figures in rows:
        topology = figures.topology
        table.add_row(
            topology.name if topology.sold == topology.name else f"{topology.name} = {topology.sold}",
            settings,
            f"{figures.needed / GIB:.2f} of {figures.limit / GIB:.2f} GiB",
            "yes" if figures.fits else "no",
            f"{figures.tokens_per_second:,.0f}",
            f"{100 * figures.mfu:.0f} %",
            BOUNDS[figures.roofline.bound],
            "compiler" if figures.compiled else "estimate",
        )
    Console().print(table)
