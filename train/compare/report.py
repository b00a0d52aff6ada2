"""The outcome of a comparison: results.json, the table in Markdown, and the plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxsteer.io import LoadedModel
from jaxsteer.io.files import write_json
from jaxsteer.steering import count_parameters
from train.devices.machine import device_summary
from train.display.plots import plot_comparison, plot_overlap
from train.evaluation.statistics import Estimate, crossed_interval


def summarise(
    results: Sequence[Mapping[str, Any]], timings: Mapping[str, Mapping[str, Any]], factor: float
) -> list[dict[str, Any]]:
    """One dict a method: what the table shows, and its differences from the first method on the same test examples.

    Args:
        results: {"entry", "best", "tried", "seeds"} for each method.
        timings: of `measure`, by name.
        factor: between learning rates.
    """
    first = [record["test"] for record in results[0]["seeds"]]
    rows = []
    for result in results:
        entry, seeds = result["entry"], result["seeds"]
        scores = [record["test"] for record in seeds]
        overlap = [np.asarray(record["overlap"])[-1] for record in seeds if np.asarray(record["overlap"]).size]
        rate = factor ** result["best"]
        rows.append(
            {
                "method": entry.name,
                "plan": list(entry.plan),
                "trainable": seeds[0]["trainable"],
                "steps": seeds[0]["steps"],
                "lr": entry.lr * rate,
                "weights_lr": None if entry.weights_lr is None else entry.weights_lr * rate,
                "validation": {
                    f"{entry.lr * record['factor']:.3g}": None
                    if record["diverged"]
                    else sum(record["validation"]) / len(record["validation"])
                    for record in result["tried"]
                },
                "at_edge": result["best"] in _edges(result),
                "test": _share(crossed_interval(scores)),
                "test_by_seed": [sum(row) / len(row) for row in scores],
                "minus_first": None
                if result is results[0]
                else crossed_interval(np.asarray(scores) - np.asarray(first))._asdict(),
                "final_loss": [float(np.mean(record["losses"][-10:])) for record in seeds],
                "overlap": None if not overlap else float(np.mean(overlap)),
                "largest_overlap": None if not overlap else float(np.max(overlap)),
                "chance_overlap": None if not overlap else seeds[0]["chance_overlap"],
                **timings[entry.name],
            }
        )
    return rows


def _share(estimate: Estimate) -> dict[str, float]:
    """An estimate of a share, its interval cut off at 0 and 1."""
    return {"mean": estimate.mean, "low": max(0.0, estimate.low), "high": min(1.0, estimate.high)}


def differences(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Accuracy of each method minus that of each later one, on the same test examples: [method][other]."""
    scores = {result["entry"].name: np.array([record["test"] for record in result["seeds"]]) for result in results}
    names = list(scores)
    return {
        one: {other: crossed_interval(scores[one] - scores[other])._asdict() for other in names[i + 1 :]}
        for i, one in enumerate(names)
    }


def _edges(result: Mapping[str, Any]) -> tuple[int, int]:
    tried = len(result["tried"])
    exponents = sorted(round(record["exponent"]) for record in result["tried"])
    assert len(exponents) == tried
    return exponents[0], exponents[-1]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The Markdown table of a comparison."""
    first = rows[0]["method"]
    head = [
        "method",
        "test accuracy, % (95 %)",
        f"minus {first} (95 %)",
        "trainable parameters",
        "learning rate",
        "steps",
        "tokens/s",
        "step's memory, GB",
        f"{rows[0]['sweep_runs']} runs as one program cost",
        "overlap Ω",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        rates = f"{row['lr']:.2g}" + (f", LoRA {row['weights_lr']:.2g}" if row["weights_lr"] is not None else "")
        cost = row["sweep_cost"]
        cells = [
            row["method"],
            _percent(row["test"]),
            "" if row["minus_first"] is None else _percent(row["minus_first"], signed=True),
            f"{row['trainable']:,}",
            rates + (" (edge)" if row["at_edge"] else ""),
            str(row["steps"]),
            f"{row['tokens_per_second']:,.0f}",
            f"{row['step_bytes'] / 1e9:.2f}",
            "not merged" if cost is None else f"{cost:.2f} runs",
            "" if row["overlap"] is None else f"{row['overlap']:.2g}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _percent(estimate: Mapping[str, float] | Estimate, signed: bool = False) -> str:
    mean, low, high = (100 * (estimate[k] if isinstance(estimate, Mapping) else getattr(estimate, k)) for k in _ENDS)
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})" if signed else f"{mean:.1f} ({low:.1f} to {high:.1f})"


_ENDS = ("mean", "low", "high")


def write_report(
    folder: Path,
    config: Any,
    results: Sequence[Mapping[str, Any]],
    timings: Mapping[str, Mapping[str, Any]],
    loaded: LoadedModel,
    untouched: Sequence[int],
) -> dict[str, Any]:
    """Write results.json, .md, .png and a plot of each overlap into the folder; return the first, and all paths."""
    rows = summarise(results, timings, config.factor)
    base = crossed_interval([untouched])
    data = {
        "model": config.base.model,
        "parameters": count_parameters(loaded.base),
        "device": device_summary(),
        "jax": jax.__version__,
        "examples": {split: len(results[0]["seeds"][0][split]) for split in ("validation", "test")},
        "seeds": config.seeds,
        "settings": config.to_json()["base"],
        "untouched": base._asdict(),
        "methods": rows,
        "differences": differences(results),
    }
    write_json(folder / "results.json", data)
    text = f"{table(rows)}\n\nThe untouched model: {_percent(base)} %.\n"
    part = folder / ".results.md.part"
    part.write_text(text, encoding="utf-8")
    part.replace(folder / "results.md")
    files = [folder / f"results.{kind}" for kind in ("json", "md", "png")]
    for result, row in zip(results, rows, strict=True):
        if row["overlap"] is not None:
            path, shared = folder / f"overlap_{result['entry'].slug}.png", np.asarray(result["seeds"][0]["overlap"])
            steps = range(1, len(shared) + 1)
            plot_overlap(path, steps, shared, chance=row["chance_overlap"], title=result["entry"].name)
            files.append(path)
    points = [(r["method"], r["trainable"], r["test"]["mean"], r["test"]["low"], r["test"]["high"]) for r in rows]
    plot_comparison(folder / "results.png", points, base=base.mean, title=f"{config.base.model}: accuracy by method")
    return data | {"files": [str(path) for path in files]}
