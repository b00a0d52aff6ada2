"""Planned contrasts of a comparison: which method is better, whether two are equal, or what is still open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from train.compare.config import Contrast
from train.compare.records import ContrastRow, MethodResult, Verdict, interval_of
from train.evaluation.statistics import Crossed, crossed, holm

LEVEL = 0.05


def judge(contrasts: Sequence[Contrast], results: Sequence[MethodResult], margin: float) -> list[ContrastRow]:
    """What each contrast shows whose methods have finished.

    Args:
        contrasts: all that were planned, which the p-values are corrected for.
        results: of the methods that have finished.
        margin: the largest difference in accuracy that counts as none, 0 to 1.
    """
    by_name = {result.entry.name: result for result in results}
    ready = [contrast for contrast in contrasts if {contrast.first, *contrast.second} <= by_name.keys()]
    pairs = [(by_name[contrast.first], _best(contrast.second, by_name)) for contrast in ready]
    found = [crossed(_paired(first, second)) for first, second in pairs]
    pending = [1.0] * (len(contrasts) - len(ready))  # those to come count in the correction
    differs, equal = (
        holm([*map(test, found), *pending])[: len(ready)] for test in (Crossed.p_differs, lambda c: c.p_within(margin))
    )
    rows: list[ContrastRow] = []
    for contrast, (_, second), each, p, p_equal in zip(ready, pairs, found, differs, equal, strict=True):
        rows.append(
            {
                "contrast": contrast.name,
                "first": contrast.first,
                "second": second.entry.name,
                "difference": interval_of(each.interval()),
                "p": p,
                "p_equal": p_equal,
                "detectable": each.detectable(),
                "verdict": _verdict(each.mean, p, p_equal),
            }
        )
    return rows


def _paired(first: MethodResult, second: MethodResult) -> np.ndarray:
    """Differences on the same problems with the same seeds, [seeds, examples]."""
    return first.test - second.test


def _best(names: Sequence[str], results: Mapping[str, MethodResult]) -> MethodResult:
    """The method with the best validation accuracy over its seeds; test answers must not decide."""
    return max((results[name] for name in names), key=lambda result: result.validation.mean())


def _verdict(mean: float, p: float, p_equal: float) -> Verdict:
    if p < LEVEL:
        return "higher" if mean > 0 else "lower"
    return "equal" if p_equal < LEVEL else "open"


def contrast_table(rows: Sequence[ContrastRow], margin: float) -> str:
    """The Markdown table of contrasts, in percentage points."""
    head = ("contrast", "difference, points (95 %)", "p (Holm)", f"p within ±{100 * margin:g}", "detectable", "verdict")
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        mean, low, high = (100 * row["difference"][name] for name in ("mean", "low", "high"))
        cells = (
            f"{row['contrast']}: {row['first']} minus {row['second']}",
            f"{mean:+.1f} ({low:+.1f} to {high:+.1f})",
            f"{row['p']:.2g}",
            f"{row['p_equal']:.2g}",
            f"{100 * row['detectable']:.1f}",
            row["verdict"],
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
