"""What of a comparison can be checked before the weights are read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

from jaxsteer.io import LoadedModel
from jaxsteer.models.transformer import Model
from train.compare.config import CompareConfig, Entry
from train.devices.placement import SINGLE, Placement
from train.evaluation.evaluator import Evaluator
from train.evaluation.neutral import neutral_examples, read_neutral
from train.run.inputs import data_inputs, example_inputs, text_inputs
from train.run.lofit import check_heads, split_steps
from train.run.program import make_program
from train.run.start import SCHEDULE_STEPS
from train.run.training import check_trains, encoding_of, read_data
from train.run.validation import task_of
from train.tasks import Split


def check_comparison(config: CompareConfig, model: LoadedModel) -> tuple[dict[str, Any], int]:
    """Read and check plans and data.

    Args:
        config: the comparison.
        model: its base model; the weights are not needed.

    Returns:
        What the comparison reads, see `train.run.inputs`, and the number of steps of each run.

    Raises:
        ValueError: a plan that does not fit the model, or data that no comparison could have.
    """
    for entry in config.chosen:
        _check_entry(config, entry, model)
    evaluator = evaluator_of(config, model)
    inputs = {}
    for split in get_args(Split):
        if split == "train":
            continue
        examples = evaluator.examples(split)
        if not examples:
            raise ValueError(f"the task has no {split} examples; a comparison needs training, validation and test")
        inputs[split] = example_inputs(examples)
    if config.neutral is not None:
        neutral_examples(texts := read_neutral(config.neutral), model.require_tokenizer())
        inputs["neutral"] = text_inputs(config.neutral, texts)
    kept = [config.train_config(entry) for entry in config.chosen if entry.method.keep.weight]
    for own in kept:
        read_data(own, model)
    for path in sorted({str(own.keep.texts) for own in kept}):
        inputs[f"keep {path}"] = text_inputs(path, read_neutral(path))
    data = read_data(config.base, model)
    steps = config.base.steps or data.source.steps(config.base.epochs)
    if any(entry.lofit is not None for entry in config.chosen):
        split_steps(steps)
    return {"train": data_inputs(*data), **inputs}, steps


def evaluator_of(config: CompareConfig, loaded: LoadedModel) -> Evaluator:
    """Answers a comparison's questions."""
    base = config.base
    return Evaluator(
        model=Model(loaded.config),
        loaded=loaded,
        task=task_of(base),
        placement=Placement(None),
        eval_batch_size=base.eval_batch_size,
        limits={"validation": base.validation_examples, "test": base.test_examples},
        loss_shape=(8, base.sequence_length),
        encoding=encoding_of(base),
    )


def _check_entry(config: CompareConfig, entry: Entry, model: LoadedModel) -> None:
    """Refuse a method whose plan does not fit the model."""
    if entry.lofit is not None:
        check_heads(model.config, entry.lofit.heads)
    run = replace(config.train_config(entry), mesh=SINGLE)
    try:
        check_trains(make_program(run, model.config, model.base, steps=run.steps or SCHEDULE_STEPS))
    except ValueError as error:
        raise ValueError(f"{entry.name}: {error}") from None
