"""What a student and its teacher read: the same completions, behind other prompts perhaps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from jaxsteer.groups import sharing_refusal
from jaxsteer.io import LoadedModel, cache_folder
from jaxsteer.models.config import ModelConfig, check_length
from train.config.distill import DistillConfig, Teacher
from train.data import Example, Split, Turn
from train.data.pairs import Layout
from train.data.records import Part, Recipe
from train.data.store import within
from train.data.taught import OWN_BASE, Origin, TaughtSource
from train.data.text_files import read_text
from train.data.tokenised import tokenised
from train.run.program import kernel_of, mesh_of
from train.run.training import RunData, encoding_of, tokenising
from train.run.validation import task_of
from train.tasks.remade import Remade


def read_taught(
    config: DistillConfig, model: LoadedModel, reader: ModelConfig, split: Split, *, by: Origin = OWN_BASE
) -> RunData:
    """The examples of a split as student and teacher read them.

    Examples of evaluations that are too long for the student's rows are left out, as their figures are means over
    tokens.

    Args:
        config: the run.
        model: the student; its weights are not needed.
        reader: the teacher's config.
        split: train, validation or test.
        by: what the teacher is besides what it reads.

    Raises:
        ValueError: completions that are other tokens for the teacher, or an example that does not fit a row.
    """
    shots = shots_of(config)
    recipe = task_of(config).recipe(split)
    if split == "train" and shots:
        recipe = _without(recipe, {shot.turns for shot in shots})
    limit = {"train": None, "validation": config.validation_examples, "test": config.test_examples}[split]
    on_long = config.on_long if split == "train" else "drop"
    encoding = replace(encoding_of(config), max_length=None)
    folder, tokenizer = cache_folder() / "tokens", model.require_tokenizer()
    student, _ = tokenised(recipe, tokenizer, encoding, folder, tokenising)
    student, report = within(
        replace(student, chosen=student.chosen[:limit]),
        replace(encoding, max_length=config.sequence_length, on_long=on_long),
        student.begins,
    )
    teacher, _ = tokenised(_as_taught(recipe, config, shots), tokenizer, encoding, folder, tokenising)
    teacher = replace(teacher, chosen=student.chosen)
    longest = int(teacher.lengths.argmax())
    check_length(reader, int(teacher.lengths[longest]), f"{teacher.source(longest)}, as the teacher reads it,")
    kernel, _ = kernel_of(config, model.config, model.base, mesh_of(config))
    refusal = sharing_refusal(kernel, split_sequence=config.mesh.split_sequence)
    layout = Layout(config.batch_size, config.sequence_length, config.seed, config.pack)
    shared = not refusal and config.teacher.prompted
    return RunData(TaughtSource(student, teacher, layout, shared, by), report)


def shots_of(config: DistillConfig) -> tuple[Example, ...]:
    """The worked examples that the teacher reads: drawn from the training examples by the run's seed.

    Raises:
        ValueError: there are not as many.
    """
    if not config.teacher.shots:
        return ()
    examples = task_of(config).load("train")
    if len(examples) <= config.teacher.shots:
        raise ValueError(f"--teacher.shots {config.teacher.shots}: there are {len(examples)} training examples in all")
    draw = np.random.default_rng(config.seed).choice(len(examples), config.teacher.shots, replace=False)
    return tuple(examples[i] for i in sorted(draw.tolist()))


def _without(recipe: Recipe, shown: set[tuple[Turn, ...]]) -> Recipe:
    """A recipe without some examples, whose rows become none."""
    keep = lambda example: None if example.turns in shown else example
    name = f"without {sorted(map(str, shown))}"
    return Recipe(tuple(Part(Remade(records, keep, name), prefix) for records, prefix in recipe.parts), recipe.choose)


def _as_taught(recipe: Recipe, config: DistillConfig, shots: Sequence[Example]) -> Recipe:
    """A recipe whose prompts are those that the teacher reads."""
    before = before_prompts(config, shots)
    make = partial(prompted, before=before)
    name = f"taught {before}"
    return Recipe(tuple(Part(Remade(records, make, name), prefix) for records, prefix in recipe.parts), recipe.choose)


def before_prompts(config: DistillConfig, shots: Sequence[Example]) -> tuple[Turn, ...]:
    """What the teacher reads before each prompt.

    Raises:
        ValueError: there is no such file.
    """
    path = config.teacher.context
    if path is not None and not Path(path).is_file():
        raise ValueError(f"--teacher.context {path}: no such file")
    context = "" if path is None else read_text(Path(path))
    return as_turns(shots, config.teacher, context, chat=config.task.chat)


def as_turns(shots: Sequence[Example], teacher: Teacher, context: str, *, chat: bool) -> tuple[Turn, ...]:
    """What the teacher reads before a prompt: messages of a chat, or one plain text."""
    if chat:
        system = () if teacher.system is None else (Turn("system", teacher.system),)
        return (*system, *(turn for shot in shots for turn in shot.turns if turn.role != "system"))
    texts = ["".join(turn.text for turn in shot.turns) + teacher.separator for shot in shots]
    return (Turn("prompt", context + "".join(texts)),) if context or texts else ()


def prompted(example: Example, before: tuple[Turn, ...]) -> Example:
    """The example behind what the teacher reads; only its own completions count.

    Raises:
        ValueError: a plain text, which nothing can be put before.
    """
    if not before:
        return example
    if before[0].role == "prompt":
        first, *rest = example.turns
        if first.role != "prompt":
            raise ValueError(f"{example.source}: has no prompt, before which the teacher could read more")
        return replace(example, turns=(Turn(first.role, before[0].text + first.text), *rest))
    own = example.turns
    if own[0].role == "system":  # comes first in a chat, after the teacher's own
        teachers = [turn.text for turn in before if turn.role == "system"]
        system = Turn("system", "\n\n".join([*teachers, own[0].text]))
        before, own = (system, *(turn for turn in before if turn.role != "system")), own[1:]
    weights = example.turn_weights or (1.0,) * len(example.turns)
    quiet = tuple(0.0 if turn.supervised else 1.0 for turn in before)
    return replace(example, turns=(*before, *own), turn_weights=(*quiet, *weights[len(weights) - len(own) :]))
