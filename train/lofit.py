"""LoFiT in two runs: `python -m train.lofit configs/jsonl.py --heads 16`.

The first run (OUT/scale) scales every attention head; the strongest are kept, and the second run (OUT/shift) learns a
vector for each of them. A finished first run is not repeated, so a command that was stopped can be given again with
--resume. The config's plan is not used; its learning rate is the second run's, the first has half of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

from jaxsteer.io import load_steering
from jaxsteer.params import Params
from jaxsteer.types import Steering
from train.cli import from_command_line, run_main
from train.config import TO_BE_RESUMED, TrainConfig
from train.run.folder import RunFolder
from train.run.lofit import lofit
from train.run.result import Result, print_result
from train.run.training import count_steps, load_base_model
from train.sft import train


@dataclass(frozen=True)
class LofitConfig(TrainConfig):
    """A training run in LoFiT's two stages."""

    heads: int = 32
    """Attention heads, of all layers together, that get a vector."""
    share: float = 0.4
    """Share of the steps for the first stage."""


class Finished(NamedTuple):
    """An earlier first run, from its steering file."""

    params: Params


class Stopped(Exception):
    """A run was asked to stop; it is saved."""


def run(config: TrainConfig, heads: int, share: float = 0.4) -> Result | None:
    """Carry out both runs; None where one was asked to stop early.

    Args:
        config: of both; its steps (or epochs) are shared by them.
        heads: number of heads that are shifted.
        share: of the steps for the first run.

    Raises:
        ValueError: bad settings or data; more heads than the model has.
    """
    steps = config.steps or count_steps(config, load_base_model(config))

    def fit(stage: str, own: TrainConfig, initial: Sequence[Steering] | None) -> list[Result | Finished]:
        folder = RunFolder(Path(config.out) / stage)
        if stage == "scale" and folder.summary.exists():
            return [Finished(Params(None, load_steering(folder.steering).steering))]
        again = config.resume or config.auto_resume  # the second run may not have begun yet
        settings = replace(own, out=str(folder.folder), resume=False, auto_resume=again)
        found = train(settings, None if initial is None else initial[0])
        if found is None:
            raise Stopped
        return [found]

    try:
        (result,) = lofit(fit, replace(config, steps=steps), steps, heads=heads, share=share)
    except Stopped:
        return None
    return result


def main() -> None:
    """Run both stages of a config and print what came out."""
    config = from_command_line("lofit", __doc__ or "", LofitConfig)
    common = TrainConfig(**{each.name: getattr(config, each.name) for each in fields(TrainConfig)})
    result = run(common, config.heads, config.share)
    if result is None:
        raise SystemExit(TO_BE_RESUMED)
    print_result(result)


if __name__ == "__main__":
    run_main(main)
