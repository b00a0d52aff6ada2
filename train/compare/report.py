"""The results of a comparison: results.json, the table in Markdown, and the plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from jaxsteer.io import LoadedModel
from jaxsteer.io.files import replacing, write_json
from jaxsteer.steering import count_parameters
from train.compare.config import CompareConfig
from train.compare.contrasts import contrast_table, judge
from train.compare.records import Interval, MethodResult, MethodRow, Results, interval_of
from train.devices.machine import device_summary
from train.display.plots import plot_comparison, plot_overlap
from train.evaluation.statistics import Estimate, crossed_interval


def summarise(results: Sequence[MethodResult], factor: float) -> list[MethodRow]:
    """The rows of the table, with each method's difference from the first on the same test examples.

    Args:
        results: of all methods.
        factor: ratio of neighbouring learning rates.
    """
    return [_row(result, None if result is results[0] else results[0], factor) for result in results]


def _row(result: MethodResult, first: MethodResult | None, factor: float) -> MethodRow:
    entry, seeds, test, overlap = result.entry, result.seeds, result.test, result.final_overlap
    rate = factor**result.best
    return {
        "method": entry.name,
        "plan": list(entry.method.plan),
        "trainable": seeds[0]["trainable"],
        "steps": seeds[0]["steps"],
        "lr": entry.lr * rate,
        "weights_lr": None if entry.weights_lr is None else entry.weights_lr * rate,
        "validation": {
            f"{entry.lr * record['factor']:.3g}": None
            if record["diverged"]
            else sum(record["validation"]) / len(record["validation"])
            for record in result.tried
        },
        "at_edge": result.at_edge,
        "test": _share(crossed_interval(test.tolist())),
        "test_by_seed": test.mean(axis=1).tolist(),
        "minus_first": None if first is None else interval_of(crossed_interval(test - first.test)),
        "final_loss": [float(np.mean(record["losses"][-10:])) for record in seeds],
        "overlap": None if overlap is None else float(np.mean(overlap)),
        "largest_overlap": None if overlap is None else float(np.max(overlap)),
        "chance_overlap": None if overlap is None else seeds[0]["chance_overlap"],
        **result.timing,
    }


def _share(estimate: Estimate) -> Interval:
    """An estimate of a share, with its interval cut off at 0 and 1."""
    return {"mean": estimate.mean, "low": max(0.0, estimate.low), "high": min(1.0, estimate.high)}


def differences(results: Sequence[MethodResult]) -> dict[str, dict[str, Interval]]:
    """Accuracy of each method minus that of each later one, on the same test examples: [method][other]."""
    return {
        result.entry.name: {
            other.entry.name: interval_of(crossed_interval(result.test - other.test)) for other in results[i + 1 :]
        }
        for i, result in enumerate(results)
    }


def table(rows: Sequence[MethodRow]) -> str:
    """The Markdown table of a comparison."""
    head = [
        "method",
        "test accuracy, % (95 %)",
        f"minus {rows[0]['method']} (95 %)",
        "trainable parameters",
        "learning rate",
        "steps",
        "tokens/s",
        "memory per step, GB",
        f"cost of {rows[0]['sweep_runs']} runs as one program",
        "overlap Ω",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        rates = f"{row['lr']:.2g}" + (f", LoRA {row['weights_lr']:.2g}" if row["weights_lr"] is not None else "")
        cells = [
            row["method"],
            _percent(row["test"]),
            "" if row["minus_first"] is None else _percent(row["minus_first"], signed=True),
            f"{row['trainable']:,}",
            rates + (" (edge)" if row["at_edge"] else ""),
            str(row["steps"]),
            f"{row['tokens_per_second']:,.0f}",
            f"{row['step_bytes'] / 1e9:.2f}",
            "not merged" if row["sweep_cost"] is None else f"{row['sweep_cost']:.2f} runs",
            "" if row["overlap"] is None else f"{row['overlap']:.2g}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _percent(interval: Interval, signed: bool = False) -> str:
    mean, low, high = (100 * share for share in (interval["mean"], interval["low"], interval["high"]))
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})" if signed else f"{mean:.1f} ({low:.1f} to {high:.1f})"


def write_report(
    folder: Path,
    config: CompareConfig,
    results: Sequence[MethodResult],
    loaded: LoadedModel,
    untouched: Sequence[int],
) -> Results:
    """Write results.json, results.md, results.png and a plot of each overlap into the folder.

    Args:
        folder: of the comparison.
        config: the comparison.
        results: of all methods.
        loaded: the base model.
        untouched: which test answers of the base model are right, 1 or 0.

    Returns:
        What results.json holds, and the paths of all files.
    """
    rows = summarise(results, config.factor)
    base = interval_of(crossed_interval([untouched]))
    first = results[0].seeds[0]
    data: Results = {
        "model": config.base.model,
        "parameters": count_parameters(loaded.base),
        "device": device_summary(),
        "jax": jax.__version__,
        "examples": {"validation": len(first["validation"]), "test": results[0].test.shape[1]},
        "seeds": config.seeds,
        "settings": config.to_json()["base"],
        "untouched": base,
        "methods": rows,
        "differences": differences(results),
        "contrasts": judge(config.contrasts, results, config.margin),
        "margin": config.margin,
    }
    write_json(folder / "results.json", data)
    with replacing(folder / "results.md") as file:
        file.write(f"{table(rows)}\n\nThe untouched model: {_percent(base)} %.\n".encode())
        if data["contrasts"]:
            file.write(f"\n{contrast_table(data['contrasts'], config.margin)}\n".encode())
    points = [(r["method"], r["trainable"], r["test"]["mean"], r["test"]["low"], r["test"]["high"]) for r in rows]
    title = f"{config.base.model}: accuracy by method"
    plot_comparison(folder / "results.png", points, base=base["mean"], title=title)
    files = [folder / f"results.{suffix}" for suffix in ("json", "md", "png")]
    files += _plot_overlaps(folder, results)
    return {**data, "files": [str(path) for path in files]}


def _plot_overlaps(folder: Path, results: Sequence[MethodResult]) -> list[Path]:
    """Plot the overlap of the first seed of every joint method; returns the paths."""
    paths = []
    for result in results:
        if result.final_overlap is not None:
            record, path = result.seeds[0], folder / f"overlap_{result.entry.slug}.png"
            overlap = np.asarray(record["overlap"])
            steps = range(1, len(overlap) + 1)
            plot_overlap(path, steps, overlap, chance=record["chance_overlap"], title=result.entry.name)
            paths.append(path)
    return paths
