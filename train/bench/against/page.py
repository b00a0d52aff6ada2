"""The figures as a Markdown table, and its place in docs/performance.md."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxsteer.io.files import write_text
from train.bench.figures import shown
from train.data.text_files import read_text

BEGIN, END = "<!-- begin: jaxsteer bench against -->", "<!-- end: jaxsteer bench against -->"
"""Lines between which a page has the table."""

HEAD = "| | ours | theirs | ours / theirs | of the bound | limited by |\n|---|---:|---:|---:|---:|---|"


def table(figures: Mapping[str, Any]) -> str:
    """The table with what it was measured on.

    Args:
        figures: the content of a file of `jaxsteer bench against`.

    Raises:
        ValueError: the file has no figures of this kind.
    """
    rows = figures.get("rows")
    if not isinstance(rows, Mapping) or not rows:
        raise ValueError("no figures of `jaxsteer bench against` in this file")
    try:
        return "\n".join([_about(figures), "", HEAD, *map(_line, rows.values()), *_tried(rows)])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a file of `jaxsteer bench against`: {type(error).__name__} {error}") from None


def write_into(page: str, figures: Mapping[str, Any]) -> None:
    """Write the table into a page, between its marks.

    Raises:
        ValueError: the page cannot be read, or does not have both marks.
    """
    write_text(page, placed(read_text(page), figures, page))


def placed(text: str, figures: Mapping[str, Any], page: str) -> str:
    """The text of a page with the table between its marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{Path(page)}: no place for the table; it needs the lines {BEGIN} and {END}")
    return f"{before}{begin}\n{table(figures)}\n{end}{after}"


def _about(figures: Mapping[str, Any]) -> str:
    """What was measured where, with what, how often."""
    machine, rows = figures["machine"], list(figures["rows"].values())
    versions = {name: version for row in rows for name, version in row["versions"].items()}
    shown = ", ".join(
        f"{name} {versions[name]}" for name in ("jax", "torch", "transformers", "peft") if name in versions
    )
    pairs = sorted({row["pairs"] for row in rows})
    count = f"{pairs[0]}" if len(pairs) == 1 else f"{pairs[0]} to {pairs[-1]}"
    models = sorted({row["settings"]["model"] for row in rows})
    return (
        f"{', '.join(models)}, float32, on {machine['cores']} cores ({machine['processor']}); {shown}. Medians of "
        f"{count} interleaved pair{'s' * (count != '1')}, with the lowest and highest ratio."
    )


def _line(row: Mapping[str, Any]) -> str:
    ratio, bound = row["ratio"], row.get("bound")
    spread = f"{ratio['median']:.2f} ({ratio['lowest']:.2f} to {ratio['highest']:.2f})"
    share = f"{100 * bound['share']:.0f} %" if bound else ""
    ours, theirs = (f"{shown(row[side]['median'], 3)} {row['unit']}" for side in ("ours", "theirs"))
    title = f"{row['title']}, against {row['theirs']['name']}"
    return f"| {title} | {ours} | {theirs} | {spread} | {share} | {row['limited_by']} |"


def _tried(rows: Mapping[str, Any]) -> list[str]:
    """Lines on what the opponent chose from."""
    lines = []
    for row in rows.values():
        if tried := row.get("tried"):
            ways = "; ".join(f"{name}: {shown(figure, 3)}" for name, figure in tried.items())
            lines.append(f"- {row['title']} ({row['unit']}): {ways}")
    heading = ["", "Where the opponent has several ways, the best of one round each was measured:", ""]
    return heading + lines if lines else []
