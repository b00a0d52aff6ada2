"""What is measured of a student beside its teacher."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import jax

from jaxsteer.models.transformer import Model, Network
from jaxsteer.objectives import Distillation, Taught
from jaxsteer.params import Params
from jaxsteer.types import Array, PyTree, Steering
from train.config.distill import DistillConfig
from train.data import Split
from train.data.taught import TaughtSource
from train.devices.processes import fetch
from train.display.console import say
from train.evaluation.answers import accuracy_of
from train.run.folder import RunFolder
from train.run.taught import before_prompts, prompted, read_taught, shots_of
from train.run.training import Training
from train.run.validation import answers_tests, task_of


class TeacherFigures:
    """(split, params) -> teacher_kl, and on the test split teacher_accuracy, of what `Evaluator` takes for a model.

    Args:
        training: the run.
    """

    def __init__(self, training: Training) -> None:
        assert isinstance(training.config, DistillConfig)
        self._training, self._config = training, training.config
        self._sources: dict[Split, TaughtSource | None] = {}
        self._answered: dict[str, float] | None = None

    def __call__(self, split: Split, params: Params) -> dict[str, float]:
        """The figures of a split; {} if it has no examples."""
        if split not in self._sources:
            self._sources[split] = self._read(split)
        source = self._sources[split]
        if source is None:
            return {}
        figures = {"teacher_kl": self._kl(source, params)}
        if split == "test":
            if self._answered is None:
                self._answered = _taught_answers(self._training)
            figures |= self._answered
        return figures

    def _read(self, split: Split) -> TaughtSource | None:
        config, training = self._config, self._training
        limit = config.test_examples if split == "test" else config.validation_examples
        if not limit or not task_of(config).recipe(split).parts:
            return None
        rows = replace(config, batch_size=config.microbatch, grad_accumulation=1)
        source = read_taught(rows, training.loaded, training.given.model.config, split).source
        assert isinstance(source, TaughtSource)
        return source

    def _kl(self, source: TaughtSource, params: Params) -> float:
        training, program = self._training, self._training.program
        base = training.loaded.base if params.base is None else params.base
        total = number = 0.0
        with program.on_mesh():
            steering = params.steering if program.mesh is None else program.placement.copies(params.steering)
            for step in range(source.steps(1.0)):  # the last batch may repeat a few examples
                inputs = program.placement.batch(source.batch(step))
                found = fetch(_summed(program.model, base, steering, inputs, training.given))
                total, number = total + float(found[0]), number + float(found[1])
        return total / max(number, 1.0)


def _taught_answers(training: Training) -> dict[str, float]:
    """The accuracy of the teacher on the test questions, which is told; {} if answers are not right or wrong."""
    config, teacher = training.config, training.given
    assert isinstance(config, DistillConfig)
    own = task_of(config).load("test")[: config.test_examples]
    if not answers_tests(config, {"test": own, "validation": []}):
        return {}
    before = before_prompts(config, shots_of(config))
    asked = [prompted(example, before) for example in own]
    evaluator = training.evaluator({}).steered_by(teacher.model)
    base = None if config.teacher.model is None else teacher.base  # None: the pretrained base of the student
    path, params = RunFolder(Path(config.out)).folder / "answers_teacher.jsonl", Params(base, teacher.steering)
    result = accuracy_of(evaluator.answer(asked, params, path, title="Evaluating the teacher", reuse=True))
    low, high = result.interval
    say(
        f"The teacher answers {100 * result.rate:.1f} % (95 %: {100 * low:.1f} to {100 * high:.1f}) of the "
        f"{result.total} test questions right",
        stderr=False,
    )
    return {"teacher_accuracy": result.rate}


@partial(jax.jit, static_argnums=0)
def _summed(model: Model, base: PyTree, steering: Steering, inputs: Taught, teacher: Network) -> tuple[Array, Array]:
    """The KL summed over the tokens of a batch, and their number."""
    summed = Distillation()(model, base, steering, inputs, teacher, None, train=False)
    fact = summed.facts["teacher_kl"]
    return fact.total, fact.number
