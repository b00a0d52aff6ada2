"""`python -m train.plan.table` plans every config for real use on every topology, and writes docs/plans.md.

What is found is kept in docs/plans.json; a table that was stopped goes on where it was. Delete it to begin again.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from train.plan.environment import prepare

ROOT = Path(__file__).parents[2]
DATA, PAGE = ROOT / "docs" / "plans.json", ROOT / "docs" / "plans.md"
MODELS = ("llama3_8b", "llama3_70b", "qwen2_5_7b", "mistral_7b", "gemma2_9b")
CONFIGS = tuple(f"{model}_{kind}" for kind in ("post_block", "lora", "joint") for model in MODELS)
TOPOLOGIES = ("v5e:4x4", "v5p:4x4x4", "v6e:4x4", "h100:8")
PROMPT_LENGTH = 512
MOST_PARTS = 64
GIB = 2**30


def plan_one(name: str, topology: str, which: str) -> dict[str, Any]:
    """Plan a program. The training step takes as few microbatches as fit; the batch stays what the config says."""
    from train.cli import load_config_file
    from train.config import TrainConfig
    from train.plan.base_models import model_config_of
    from train.plan.estimate import estimate_training, make_estimated
    from train.plan.figures import figures_of
    from train.plan.topology import parse_topology

    config = load_config_file(ROOT / "configs" / f"{name}.py", TrainConfig)
    model_config, there = model_config_of(config), parse_topology(topology)
    parts = config.grad_accumulation
    while True:
        change = replace(config, grad_accumulation=parts)
        most = parts == MOST_PARTS or config.batch_size // (2 * parts) < there.chips
        program = make_estimated(change, model_config, there)
        likely = estimate_training(program, change).peak <= 1.05 * there.chip.memory
        if which == "decode" or likely or most:
            found = figures_of(which, change, model_config, there, PROMPT_LENGTH)  # type: ignore[arg-type]
            if found.fits or most or which == "decode":
                return found.to_json() | {
                    "rows": config.batch_size,
                    "length": config.sequence_length,
                    "grad_accumulation": parts,
                }
        parts *= 2


def collect() -> dict[str, Any]:
    """All that is known, after planning what was not; saved after every program."""
    data: dict[str, Any] = json.loads(DATA.read_text()) if DATA.exists() else {}
    wanted = [f"{name} {there} {which}" for which in ("train", "decode") for name in CONFIGS for there in TOPOLOGIES]
    for number, key in enumerate(wanted, 1):
        if key not in data:
            name, topology, which = key.split()
            print(f"{number} of {len(wanted)}: {key}", file=sys.stderr, flush=True)
            data[key] = plan_one(name, topology, which)
            data[key].pop("compile_seconds")
            data = {key: data[key] for key in wanted if key in data}
            DATA.write_text(json.dumps(data, indent=1) + "\n")
            PAGE.write_text(page(data))
    return data


def page(data: dict[str, Any]) -> str:
    """The table as Markdown."""
    lines = [INTRODUCTION, "## Training", "", TRAINING_HEAD, "|---|---|---|---|---:|---:|---:|---:|---:|"]
    for key, each in data.items():
        name, _, which = key.split()
        if which == "train":
            batch = f"{each['rows']} x {each['length']:,}"
            batch += f" in {each['grad_accumulation']}" if each["grad_accumulation"] > 1 else ""
            lines.append(_row(_title(name), _chips(each), batch, each["mesh"], *_memory(each), *_speed(each)))
    decoding = [key for key in data if key.endswith("decode")]
    if decoding:
        lines += ["", "## Decoding", "", DECODING, "", DECODING_HEAD, "|---|---|---:|---:|---:|---:|"]
        lines += [
            _row(_title(key.split()[0]), _chips(data[key]), *_memory(data[key]), _speed(data[key])[0])
            for key in decoding
        ]
    both = [each for each in data.values() if each["compiled"] and each["fits"]]
    if both:
        off = {
            which: [each["estimated"] / each["needed"] - 1 for each in both if each["which"] == which]
            for which in ("train", "decode")
        }
        lines += ["", "## How far the estimate is off", "", "Against the compiled peaks above:", ""]
        for which, name in (("train", "training"), ("decode", "decoding")):
            if values := off[which]:
                lines.append(
                    f"- {name}: {100 * min(values):+.0f} to {100 * max(values):+.0f} %, on average "
                    f"{100 * mean(map(abs, values)):.0f} % off ({len(values)} programs)"
                )
    return "\n".join(lines) + "\n"


INTRODUCTION = """# Will it fit, and how fast can it be

Written by `python -m train.plan.table` from [plans.json](plans.json). For TPUs the real programs of each config were
compiled for the topology, without one, by libtpu 0.0.42 under jax 0.10.2 (`JAX_OPTIMIZATION_LEVEL=O1`); "peak" is the
compiler's. For GPUs it is the analytic estimate, marked ≈, and nothing was compiled. No program was run.

Tokens/s and MFU are upper bounds: the roofline of the chips' published figures, with full rows whose every position
is supervised. "In 4" is a batch accumulated over 4 microbatches, the fewest that fit. Collectives are what a chip
sends in one run of the program.
"""

TRAINING_HEAD = (
    "| config | chips | batch | mesh | peak, GiB a chip | of | collectives, GiB | tokens/s, at most | MFU, at most |"
)
DECODING_HEAD = "| config | chips | peak, GiB a chip | of | collectives, GiB | tokens/s, at most |"
DECODING = """64 prompts of 512 tokens at a time, 256 new tokens each, on the mesh of the training: there every token
gathers every weight over `fsdp`, so that the network bounds the speed."""


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _title(name: str) -> str:
    return f"[{name}](../configs/{name}.py)"


def _chips(each: dict[str, Any]) -> str:
    return each["topology"] if each["topology"] == each["sold"] else f"{each['topology']} ({each['sold']})"


def _memory(each: dict[str, Any]) -> tuple[str, str, str]:
    sent = sum(traffic["sent"] for traffic in each["collectives"].values()) / GIB
    mark = "" if each["compiled"] else "≈ "
    peak = f"{mark}{each['needed'] / GIB:.1f}" if each["fits"] else f"does not fit ({each['needed'] / GIB:.1f})"
    return peak, f"{each['limit'] / GIB:.1f}", f"{sent:.1f}" if each["compiled"] and each["fits"] else "-"


def _speed(each: dict[str, Any]) -> tuple[str, str]:
    if not each["fits"]:
        return "-", "-"
    return f"{each['tokens_per_second']:,.0f}", f"{100 * each['mfu']:.0f} %"


def main() -> None:
    """Plan what is missing and write the page."""
    prepare()
    PAGE.write_text(page(collect()))


if __name__ == "__main__":
    main()
