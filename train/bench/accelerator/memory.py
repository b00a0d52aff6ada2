"""The stage memory: measured peaks against what `train.plan` had estimated for the same step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from train.bench.accelerator.inputs import base_shapes_of
from train.bench.accelerator.records import Context, Figures, Record, Row, Stage, latest
from train.bench.accelerator.settings import POST_BLOCK, AcceleratorBench, Shapes
from train.bench.accelerator.training import Trial
from train.config import TrainConfig
from train.devices.placement import SINGLE
from train.plain import from_plain
from train.plan.estimate import Estimate, estimate_decoding, estimate_training
from train.plan.programs import SCHEDULE_STEPS
from train.run.program import make_program
from train.tasks import JsonlTask

PEAK = "peak memory, GB"
"""The figure of other stages that is compared."""


def _of_training(record: Record, shapes: Shapes) -> Estimate:
    fields = {name: value for name, value in record.settings.items() if name in Trial.__dataclass_fields__}
    trial = from_plain(Trial, fields, record.row)
    base = base_shapes_of(shapes.model, shapes.dtype)
    return estimate_training(trial.program(shapes, base, record.device.platform), trial.config(shapes))


def _of_decoding(record: Record, shapes: Shapes) -> Estimate:
    task = JsonlTask("none.jsonl", max_new_tokens=shapes.new_tokens)
    rows = record.settings["rows"]
    config = TrainConfig(task=task, plan=POST_BLOCK, eval_batch_size=rows, dtype=shapes.dtype, mesh=SINGLE)
    base = base_shapes_of(shapes.model, shapes.dtype)
    program = make_program(config, shapes.model, base, steps=SCHEDULE_STEPS, platform=record.device.platform)
    return estimate_decoding(program, config, shapes.prompt)


ESTIMATES = {"train8b": _of_training, "decode": _of_decoding}
"""How the rows of a stage are estimated."""


def _compare(record: Record, context: Context) -> Figures:
    estimate = ESTIMATES[record.stage](record, context.config.shapes)
    measured = record.figures.get(PEAK)
    parts = {f"estimated {name}, GB": size / 1e9 for name, size in estimate.parts.items()}
    return {
        "outcome": record.outcome,
        "measured, GB": measured,
        "estimated, GB": estimate.peak / 1e9,
        "measured / estimated": None if measured is None else 1e9 * measured / estimate.peak,
        **parts,
    }


def rows(config: AcceleratorBench, records: Sequence[Record]) -> list[Row]:
    """A row for each step that was measured, or that ran out of memory trying."""
    measured = [
        record
        for record in latest(records)
        if record.stage in ESTIMATES
        and record.settings["small"] == config.small
        and (record.outcome == "measured" or (record.outcome == "out of memory" and record.attempts))
    ]
    return [
        Row(
            f"{record.stage}: {record.row}",
            partial(_compare, record),
            {"of": dict(record.settings), "measured": record.figures.get(PEAK)},
            seconds=5.0,
            needs=(),
            here=True,
        )
        for record in measured
    ]


STAGE = Stage("memory", "peaks of what train8b and decode measured, against the estimates of `jaxsteer plan`", rows)
