"""How a run learns from a teacher: what the teacher reads, its weights, and the KL from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.groups import sharing_refusal
from jaxsteer.io import LoadedModel, cache_folder
from jaxsteer.models.transformer import Model, Network
from jaxsteer.objectives import Distillation, Taught
from jaxsteer.params import Params
from jaxsteer.steering import count_parameters
from jaxsteer.types import Array, Plan, PyTree, Steering
from train.base_models import describe, load
from train.config import TrainConfig
from train.config.distill import DistillConfig, Teacher
from train.data import Example, Split, Turn
from train.data.pairs import Layout
from train.data.records import Part, Recipe
from train.data.store import within
from train.data.taught import TaughtSource
from train.data.text_files import read_text
from train.data.tokenised import tokenised
from train.devices.processes import fetch
from train.display.console import say
from train.run.algorithm import Algorithm, Measure
from train.run.program import kernel_of, mesh_of
from train.run.start import read_start
from train.run.training import RunData, Training, encoding_of, tokenising
from train.run.validation import task_of
from train.tasks.remade import Remade
from train.tasks.scoring import Metric


@dataclass(frozen=True)
class FromTeacher(Algorithm):
    """Learns a teacher's next-token distributions."""

    metric: ClassVar[Metric | None] = "teacher_kl"

    def read_data(self, config: TrainConfig, model: LoadedModel) -> RunData:
        """Read and tokenise the examples, as the student and as the teacher reads them.

        Raises:
            ValueError: a teacher that cannot be, or examples that differ.
        """
        assert isinstance(config, DistillConfig)
        _check_teacher(config, model)
        return read_taught(config, model, "train")

    def given(self, training: Training) -> Network:
        """The teacher, placed."""
        config = training.config
        assert isinstance(config, DistillConfig)
        teacher, program = config.teacher, training.program
        base, model_config = training.loaded.base, training.loaded.config
        if teacher.model is not None:
            loaded = load(teacher.model, config.dtype, program.placement.base, tokenizer=config.tokenizer)
            base, model_config = loaded.base, loaded.config
            say(f"Teacher: {teacher.model}, {count_parameters(base):,} parameters, beside the student", stderr=False)
        elif config.train_base:
            say("Note: the teacher keeps the pretrained base beside the one that trains", stderr=False)
        plan, steering = _steering_of(teacher)
        model = Model(model_config, plan, attention=program.model.attention)
        return Network(model, base, steering if program.mesh is None else program.placement.copies(steering))

    def measure(self, training: Training) -> Measure:
        """The mean KL from the teacher, on a split."""
        return TeacherKl(training)


def _check_teacher(config: DistillConfig, model: LoadedModel) -> None:
    teacher = config.teacher
    theirs = model
    if teacher.model is not None:
        theirs = describe(teacher.model, config.dtype, tokenizer=config.tokenizer)
        if theirs.config.vocab_size != model.config.vocab_size:
            raise ValueError(
                f"--teacher.model {teacher.model}: has {theirs.config.vocab_size:,} tokens, the student "
                f"{model.config.vocab_size:,}; distributions can be compared over one vocabulary only"
            )
        if theirs.require_tokenizer().get_vocab() != model.require_tokenizer().get_vocab():
            raise ValueError(f"--teacher.model {teacher.model}: has another tokenizer than the student")
    if teacher.steering is not None:
        read_start(teacher.steering, option="--teacher.steering").check(theirs.config)


def _steering_of(teacher: Teacher) -> tuple[Plan, Steering]:
    if teacher.steering is None:
        return (), {}
    file = read_start(teacher.steering, option="--teacher.steering")
    return file.plan, jax.tree.map(jnp.asarray, file.steering)


def read_taught(config: DistillConfig, model: LoadedModel, split: Split, limit: int | None = None) -> RunData:
    """The examples of a split as student and teacher read them.

    Args:
        config: the run.
        model: the student; its weights are not needed.
        split: train, validation or test.
        limit: maximum number of examples.
    """
    shots = shots_of(config)
    recipe = task_of(config).recipe(split)
    if split == "train" and shots:
        recipe = _without(recipe, {shot.turns for shot in shots})
    encoding = replace(encoding_of(config), max_length=None)
    folder, tokenizer = cache_folder() / "tokens", model.require_tokenizer()
    student, _ = tokenised(recipe, tokenizer, encoding, folder, tokenising)
    student, report = within(
        replace(student, chosen=student.chosen[:limit]),
        replace(encoding, max_length=config.sequence_length, on_long=config.on_long),
        student.begins,
    )
    teacher, _ = tokenised(_as_taught(recipe, config, shots), tokenizer, encoding, folder, tokenising)
    teacher = replace(teacher, chosen=student.chosen)
    kernel, _ = kernel_of(config, model.config, model.base, mesh_of(config))
    refusal = sharing_refusal(kernel, split_sequence=config.mesh.split_sequence)
    layout = Layout(config.batch_size, config.sequence_length, config.seed, config.pack)
    return RunData(TaughtSource(student, teacher, layout, not refusal and config.teacher.prompted), report)


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
    teacher = config.teacher
    context = "" if teacher.context is None else read_text(Path(teacher.context))
    before = as_turns(shots, teacher, context, chat=config.task.chat)
    make = partial(prompted, before=before)
    name = f"taught {before}"
    return Recipe(tuple(Part(Remade(records, make, name), prefix) for records, prefix in recipe.parts), recipe.choose)


def as_turns(shots: Sequence[Example], teacher: Teacher, context: str, *, chat: bool) -> tuple[Turn, ...]:
    """What the teacher reads before a prompt: messages of a chat, or one plain text."""
    if chat:
        system = () if teacher.system is None else (Turn("system", teacher.system),)
        return (*system, *(turn for shot in shots for turn in shot.turns if turn.role != "system"))
    texts = ["".join(turn.text for turn in shot.turns) + teacher.separator for shot in shots]
    return (Turn("prompt", context + "".join(texts)),) if context or texts else ()


def prompted(example: Example, before: tuple[Turn, ...]) -> Example:
    """The example behind what the teacher reads; only its own completions count."""
    if not before:
        return example
    if before[0].role == "prompt":
        first, *rest = example.turns
        return replace(example, turns=(Turn(first.role, before[0].text + first.text), *rest))
    own = example.turns
    if before[0].role == "system" and own[0].role == "system":
        before, own = (Turn("system", f"{before[0].text}\n\n{own[0].text}"), *before[1:]), own[1:]
    weights = example.turn_weights or (1.0,) * len(example.turns)
    quiet = tuple(0.0 if turn.supervised else 1.0 for turn in before)
    return replace(example, turns=(*before, *own), turn_weights=(*quiet, *weights[len(weights) - len(own) :]))


class TeacherKl:
    """(split, params) -> teacher_kl, of what `Evaluator` takes for a model.

    Args:
        training: the run.
    """

    def __init__(self, training: Training) -> None:
        assert isinstance(training.config, DistillConfig)
        self._training, self._config = training, training.config
        self._sources: dict[Split, TaughtSource] = {}

    def __call__(self, split: Split, params: Params) -> dict[str, float]:
        """The KL on a split; {} if it has no examples."""
        config, training = self._config, self._training
        limit = config.test_examples if split == "test" else config.validation_examples
        if not limit or not task_of(config).recipe(split).parts:
            return {}
        if split not in self._sources:
            rows = replace(config, batch_size=config.microbatch, grad_accumulation=1, on_long="drop")
            self._sources[split] = read_taught(rows, training.loaded, split, limit).source  # type: ignore[assignment]
        source, program = self._sources[split], training.program
        base = training.loaded.base if params.base is None else params.base
        total = number = 0.0
        with program.on_mesh():
            steering = params.steering if program.mesh is None else program.placement.copies(params.steering)
            for step in range(source.steps(1.0)):  # the last batch may repeat a few examples
                inputs = program.placement.batch(source.batch(step))
                found = fetch(_summed(program.model, base, steering, inputs, training.given))
                total, number = total + float(found[0]), number + float(found[1])
        return {"teacher_kl": total / max(number, 1.0)}


@partial(jax.jit, static_argnums=0)
def _summed(model: Model, base: PyTree, steering: Steering, inputs: Taught, teacher: Network) -> tuple[Array, Array]:
    """The KL summed over the tokens of a batch, and their number."""
    summed = Distillation()(model, base, steering, inputs, teacher, None, train=False)
    fact = summed.facts["teacher_kl"]
    return fact.total, fact.number
