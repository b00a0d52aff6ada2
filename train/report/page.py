"""The page itself: one HTML file with its styles, its pictures and a few lines of script, which loads nothing."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

import jaxsteer
from train.report import chart
from train.report.comparison import comparison_of
from train.report.record import find_runs, read_record
from train.report.replies import KINDS
from train.report.view import view_of
from train.report.words import date
from train.run.folder import now

TEMPLATES = Path(__file__).parent / "templates"


def make_page(paths: Sequence[str], examples: int) -> str:
    """The report on one run, or on several and how they compare.

    Args:
        paths: folders of runs, see `find_runs`.
        examples: maximum number of answers shown of each run.

    Raises:
        ValueError: a path is no run, or its config.json is damaged.
    """
    folders = find_runs(paths)
    records = [read_record(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    comparison = comparison_of(records) if len(records) > 1 else None
    html = (
        _environment()
        .get_template("report.html.j2")
        .render(
            views=[view_of(record, examples) for record in records],
            comparison=comparison,
            kinds=KINDS,
            script=Markup(_source("script.js")),
            script_digest=_digest(_source("script.js")),
            style=Markup(_source("style.css")),
            made=date(now()),
            version=jaxsteer.__version__,
        )
    )
    return html.encode("utf-8", "backslashreplace").decode()  # half of a surrogate pair is no character


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names; with their parents' where two are the same."""
    names = [folder.resolve().name for folder in folders]
    return [str(folder) if names.count(name) > 1 else name for folder, name in zip(folders, names, strict=True)]


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"LEFT": chart.LEFT, "WIDTH": chart.WIDTH, "HEIGHT": chart.HEIGHT, "COLORS": chart.COLORS}
    environment.filters |= {"short": chart.short, "depth": _depth}
    return environment


def _depth(norm: float, top: float) -> int:
    """How dark a cell is, in percent of the darkest."""
    return round(100 * norm / top) if top > 0 and math.isfinite(norm / top) else 0


def _source(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    """A script's digest as a Content-Security-Policy names it."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
