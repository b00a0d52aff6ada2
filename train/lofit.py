"""LoFiT in two runs: `python -m train.lofit configs/jsonl.py --heads 16`.

The first run (OUT/scale) learns a scale for every attention head. The heads with the strongest scales are kept, and the
second run (OUT/shift) learns a vector for each of them. A finished first run is not repeated, so a stopped command can
be repeated with --resume. The config's plan is ignored; its learning rate is the second run's, the first uses half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from jaxsteer.io import load_config, load_steering
from jaxsteer.params import Params
from jaxsteer.types import Steering
from train.base_models import resolve_model
from train.cli import Run, from_command_line, run_main
from train.config import TO_BE_RESUMED, TrainConfig
from train.devices.placement import place_on
from train.devices.processes import fetch, join
from train.run.folder import RunFolder, open_run
from train.run.lofit import check_heads, lofit
from train.run.result import Result, print_result
from train.run.training import count_steps, load_base_model
from train.sft import train


@dataclass(frozen=True)
class LofitConfig:
    """A training run in LoFiT's two stages."""

    run: Run
    """The settings of both stages; their steps (or epochs) are shared."""
    heads: int = 32
    """Number of attention heads, over all layers, that get a vector."""
    share: float = 0.4
    """Share of the steps for the first stage."""


class Scaled(NamedTuple):
    """The outcome of the first run, on the host."""

    params: Params


class Stopped(Exception):
    """A run was asked to stop; it has saved a checkpoint."""


def train_lofit(config: TrainConfig, heads: int, share: float = 0.4) -> Result | None:
    """Carry out both runs; None if one was asked to stop early.

    Args:
        config: settings of both; they share its steps (or epochs).
        heads: number of heads to shift.
        share: share of the steps for the first run.

    Raises:
        ValueError: bad settings or data; more heads than the model has; a first run with other settings.
    """
    check_heads(load_config(resolve_model(config.model)), heads)
    place = place_on(config.mesh, config.microbatch).base
    steps = config.steps or count_steps(config, load_base_model(config, place))

    def fit(stage: str, own: TrainConfig, initial: Sequence[Steering] | None) -> list[Result | Scaled]:
        folder = RunFolder(Path(config.out) / stage)
        if stage == "scale" and folder.summary.exists():
            open_run(folder.folder, own.to_json(), resume=True)  # refuses one with other settings
            return [Scaled(Params(None, load_steering(folder.steering).steering))]
        resume = config.resume or config.auto_resume  # the second run may not have started yet
        settings = replace(own, out=str(folder.folder), resume=False, auto_resume=resume)
        result = train(settings, None if initial is None else initial[0])
        if result is None:
            raise Stopped
        return [Scaled(Params(None, fetch(result.params.steering))) if stage == "scale" else result]

    try:
        (result,) = lofit(fit, replace(config, steps=steps), steps, heads=heads, share=share)
    except Stopped:
        return None
    return result


def main() -> None:
    """Run both stages of a config and print the result."""
    config = from_command_line("lofit", __doc__ or "", LofitConfig)
    join(config.run.distributed)
    result = train_lofit(config.run, config.heads, config.share)
    if result is None:
        raise SystemExit(TO_BE_RESUMED)
    print_result(result)


if __name__ == "__main__":
    run_main(main)
