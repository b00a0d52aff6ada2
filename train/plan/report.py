"""What the fit check prints."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from train.display.console import print_facts
from train.plan.estimate import Roofline
from train.plan.figures import EFFICIENCY, Figures
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


def expected_speed(figures: Figures) -> str:
    """Time, throughput and utilisation at the assumed share of the roofline's speed."""
    unit = "per step" if figures.which == "train" else "for all tokens"
    expected = figures.expected
    return (
        f"{expected['seconds']:.3g} s {unit}, {expected['tokens_per_second']:,.0f} tokens/s, MFU "
        f"{100 * expected['mfu']:.0f} %, if it reaches {100 * EFFICIENCY:.0f} % of the best (an assumption)"
    )


def best_speed(figures: Figures) -> str:
    """Time and throughput at the roofline, which no run reaches."""
    return (
        f"{figures.roofline.seconds:.3g} s, {figures.tokens_per_second:,.0f} tokens/s: the chips' published peaks, "
        f"bound by {BOUNDS[figures.roofline.bound]}"
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
            "expect": expected_speed(figures),
            "at best": best_speed(figures),
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


_CAPTION = f"tokens/s and MFU: expected, at an assumed {100 * EFFICIENCY:.0f} % of the best that the chips' peaks allow"


def print_comparison(rows: Sequence[tuple[str, Figures]], title: str) -> None:
    """Print a line per compiled step, to compare topologies or the settings of a search, and the settings below.

    Args:
        rows: (what was checked, figures).
        title: above the table.
    """
    console = Console()
    table = Table(title=title, title_justify="left", caption=_CAPTION, caption_justify="left")
    for column in ("", "topology", "GiB per chip", "fits", "tokens/s", "MFU", "bound by", "from"):
        right = column in ("", "GiB per chip", "tokens/s", "MFU")
        table.add_column(column, justify="right" if right else "left", no_wrap=column == "topology")
    for number, (_, figures) in enumerate(rows, 1):
        table.add_row(
            str(number),
            figures.topology.name,
            f"{figures.needed / GIB:.2f}/{figures.limit / GIB:.2f}",
            "yes" if figures.fits else "no",
            f"{figures.expected['tokens_per_second']:,.0f}",
            f"{100 * figures.expected['mfu']:.0f} %",
            BOUNDS[figures.roofline.bound],
            "compiler" if figures.compiled else "estimate",
        )
    console.print(table)
    for number, (settings, figures) in enumerate(rows, 1):  # whole lines, to be copied, however narrow the screen is
        chips = f"--topology {figures.topology.name}"
        console.print(f"{number}  {chips} {settings}", highlight=False, markup=False, soft_wrap=True)
