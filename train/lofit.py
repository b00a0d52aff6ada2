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

from jaxsteer.io import load_config, load_steering, save_steering
from jaxsteer.io.files import Json, read_json
from jaxsteer.params import Params
from jaxsteer.ranges import Count, Inside, check_ranges
from jaxsteer.types import Steering
from train.base_models import describe, resolve_model
from train.cli import Run, from_command_line, run_main
from train.config import TO_BE_RESUMED, TrainConfig
from train.devices.processes import fetch, join, on_first
from train.run.folder import RunFolder, check_run, locked, open_run, read_inputs
from train.run.lofit import SHARE, STAGES, check_heads, lofit, split_steps
from train.run.loop import train
from train.run.result import Result, print_result
from train.run.row_length import with_row_length
from train.run.start import changes_for, filled, prepare
from train.run.training import count_steps, encoding_of


@dataclass(frozen=True)
class LofitConfig:
    """A training run in LoFiT's two stages."""

    run: Run[TrainConfig]
    """The settings of both stages; their steps (or epochs) are shared."""
    heads: Count = 32
    """Number of attention heads, over all layers, that get a vector."""
    share: Inside = SHARE
    """Share of the steps for the first stage."""

    def __post_init__(self) -> None:
        """Reject no heads, and a stage without steps."""
        check_ranges(self)


class Scaled(NamedTuple):
    """The outcome of the first run, on the host."""

    params: Params


class Stopped(Exception):
    """A run was asked to stop; it has saved a checkpoint."""


def train_lofit(config: TrainConfig, heads: int, share: float = SHARE) -> Result | None:
    """Carry out both runs; None if one was asked to stop early.

    Args:
        config: settings of both; they share its steps (or epochs).
        heads: number of heads to shift.
        share: share of the steps for the first run.

    Raises:
        ValueError: bad settings or data; more heads than the model has; a first run with other settings or data.
    """
    if config.start_from is not None or config.extend:
        raise ValueError("lofit: --start-from and --extend have no effect: its two stages begin and end in a fixed way")
    check_heads(load_config(resolve_model(config.model)), heads)
    whole = RunFolder(Path(config.out))
    with locked(whole.folder):
        config = _open(config, whole, heads, share)
        return _both_stages(config, heads, share)


def _open(config: TrainConfig, whole: RunFolder, heads: int, share: float) -> TrainConfig:
    """Start or resume the folder of both stages. Returns the settings with number of steps and day filled in."""
    resume = config.resume or (config.auto_resume and whole.begun)
    stored = on_first(lambda: read_json(whole.config) if whole.config.exists() and resume else {})
    config = filled(config, stored.get("run"))
    model = describe(config.model, config.dtype, tokenizer=config.tokenizer)
    config = replace(config, date=encoding_of(config).dated(model.require_tokenizer()).date)
    config = with_row_length(config, model)
    settings = {"run": config.to_json(), "heads": heads, "share": share}
    on_first(lambda: check_run(whole.folder, settings, resume=resume) and None)
    steps = config.steps or count_steps(config, model)
    split_steps(steps, share)
    on_first(lambda: open_run(whole.folder, settings, resume=resume) and None)
    return replace(config, steps=steps)


def _both_stages(config: TrainConfig, heads: int, share: float) -> Result | None:
    assert config.steps is not None

    def fit(stage: str, own: TrainConfig, initial: Sequence[Steering] | None) -> list[Result | Scaled]:
        folder = RunFolder(Path(config.out) / stage)
        if stage == "scale" and folder.summary.exists():
            _check_finished(own, folder)
            return [Scaled(Params(None, load_steering(folder.steering).steering))]
        resume = config.resume or config.auto_resume  # the second run may not have started yet
        settings = replace(own, out=str(folder.folder), resume=False, auto_resume=resume)
        result = train(settings, None if initial is None else initial[0])
        if result is None:
            raise Stopped
        return [Scaled(Params(None, fetch(result.params.steering))) if stage == "scale" else result]

    try:
        (result,) = lofit(fit, config, config.steps, heads=heads, share=share)
    except Stopped:
        return None
    on_first(lambda: _name_first_stage(Path(config.out), heads, share))
    return result


def _name_first_stage(out: Path, heads: int, share: float) -> None:
    """Write into the notes of the second stage's steering what it was made from."""
    first, last = (load_steering(RunFolder(out / stage).steering) for stage in STAGES)
    stages: list[Json] = [*first.provenance, {"by": "lofit", "heads": heads, "share": share}]
    save_steering(
        last.path,
        last.steering,
        last.plan,
        model_name=last.model_name,
        config=load_config(resolve_model(last.model_name)),
        notes={**last.notes, "provenance": stages},
        sample=last.sample,
    )


def _check_finished(config: TrainConfig, folder: RunFolder) -> None:
    """Refuse a finished first stage that had other settings or data."""
    prepared = prepare(config, on_first(lambda: read_json(folder.config)), on_first(lambda: read_inputs(folder)))
    changes = changes_for(config)
    on_first(
        lambda: (
            open_run(folder.folder, prepared.settings, resume=True, inputs=prepared.inputs, changes=changes) and None
        )
    )


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
