"""The results of a comparison: results.json, the table in Markdown, and the plots."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from jaxsteer.io import LoadedModel
from jaxsteer.io.files import replacing, write_json
from jaxsteer.steering import count_parameters
from train.compare.config import CompareConfig
from train.compare.contrasts import contrast_table, judge
from train.compare.records import Agreement, Interval, MethodResult, MethodRow, Results, Timing, interval_of
from train.devices.machine import device_summary
from train.display.plots import Point, plot_comparison, plot_overlap
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
        "examples": seeds[0]["examples"],
        "kl": None if (kl := result.kl) is None else interval_of(crossed_interval(kl.tolist())),
        "decoded": result.decoded,
        "overlap": None if overlap is None else float(np.mean(overlap)),
        "largest_overlap": None if overlap is None else float(np.max(overlap)),
        "chance_overlap": None if overlap is None else seeds[0]["chance_overlap"],
        "timing": result.timing,
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
    ]
    together = max((row["timing"]["sweep_runs"] for row in rows if row["timing"]), default=0)
    costs = ["tokens/s", "memory per step, GB"] if together else []
    costs += [f"cost of {together} runs as one program"] if together > 1 else []
    head += [*costs, "overlap Ω"]
    with_kl, by_examples = any(row["kl"] for row in rows), len({row["examples"] for row in rows}) > 1
    decoded = any(row["decoded"] for row in rows)
    head += ["KL on neutral text, nats per token (95 %)"] * with_kl + ["training examples"] * by_examples
    head += ["decoded beside predicted, %"] * decoded
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        rates = f"{row['lr']:.2g}" + (f", LoRA {row['weights_lr']:.2g}" if row["weights_lr"] is not None else "")
        cells = [
            row["method"],
            _percent(row["test"]),
            "" if row["minus_first"] is None else _percent(row["minus_first"], signed=True),
            f"{row['trainable']:,}",
            rates + (" (edge)" if row["at_edge"] else " (given)" if len(row["validation"]) == 1 else ""),
            str(row["steps"]),
            *_costs(row["timing"])[: len(costs)],
            "" if row["overlap"] is None else f"{row['overlap']:.2g}",
        ]
        cells += [_nats(row["kl"])] * with_kl + [f"{row['examples']:,}"] * by_examples
        cells += [_beside(row["decoded"])] * decoded
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _costs(timing: Timing | None) -> tuple[str, str, str]:
    if timing is None:
        return "", "", ""
    sweep = "not merged" if timing["sweep_cost"] is None else f"{timing['sweep_cost']:.2f} runs"
    return f"{timing['tokens_per_second']:,.0f}", f"{timing['step_bytes'] / 1e9:.2f}", sweep


def _percent(interval: Interval, signed: bool = False) -> str:
    mean, low, high = (100 * share for share in (interval["mean"], interval["low"], interval["high"]))
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})" if signed else f"{mean:.1f} ({low:.1f} to {high:.1f})"


def _nats(interval: Interval | None) -> str:
    if interval is None:
        return ""
    return f"{interval['mean']:.3g} ({max(0.0, interval['low']):.3g} to {interval['high']:.3g})"


def _beside(agreement: Agreement | None) -> str:
    if agreement is None:
        return ""
    percent = lambda share: f"{100 * share:.1f}"
    both = f"{percent(agreement['decoded'])}, {percent(agreement['predicted'])}"
    return f"{both} of {agreement['examples']}; agree on {percent(agreement['agree'])}"


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
        results: of the methods that have finished, in the order of the config.
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
        "unfinished": [entry.name for entry in config.chosen[len(results) :]],
        "differences": differences(results),
        "contrasts": judge(config.contrasts, results, config.margin),
        "margin": config.margin,
    }
    write_json(folder / "results.json", data)
    with replacing(folder / "results.md") as file:
        file.write(f"{table(rows)}\n\nThe untouched model: {_percent(base)} %.\n".encode())
        if data["unfinished"]:
            file.write(f"\nNot finished: {'; '.join(data['unfinished'])}.\n".encode())
        if data["contrasts"]:
            file.write(f"\n{contrast_table(data['contrasts'], config.margin)}\n".encode())
    files = [folder / "results.json", folder / "results.md"]
    files += [*_plot_accuracies(folder, config, rows, base["mean"]), *_plot_overlaps(folder, results)]
    return {**data, "files": [str(path) for path in files]}


def _plot_accuracies(folder: Path, config: CompareConfig, rows: Sequence[MethodRow], base: float) -> list[Path]:
    """Plot accuracy against size, and against what it costs on neutral text if that was measured; returns the paths."""
    axes: dict[str, tuple[str, Callable[[MethodRow], float | None]]] = {
        "parameters": ("trainable parameters", lambda row: row["trainable"]),
        "examples": ("training examples", lambda row: row["examples"]),
    }
    drawn = {"results.png": axes[config.axis]}
    if any(row["kl"] for row in rows):
        drawn["results_kl.png"] = ("KL on neutral text, nats per token", _kl)
    for name, (xlabel, x) in drawn.items():
        series: dict[str, list[Point]] = defaultdict(list)
        for entry, row in zip(config.chosen[: len(rows)], rows, strict=True):
            test = row["test"]
            if (at := x(row)) is not None:
                series[entry.series or entry.name].append((at, test["mean"], test["low"], test["high"]))
        title = f"{config.base.model}: accuracy by method"
        exact = name == "results.png"
        plot_comparison(folder / name, series, xlabel=xlabel, base=base, bands=exact, title=title)
    return [folder / name for name in drawn]


def _kl(row: MethodRow) -> float | None:
    return row["kl"] and row["kl"]["mean"]


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
