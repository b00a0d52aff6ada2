"""How a run learns from a teacher: who it is, its weights, and the KL from it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxsteer.io import LoadedModel, SteeringFile, sample_weights
from jaxsteer.models.transformer import Model, Network
from jaxsteer.steering import count_parameters, steering_shapes
from train.base_models import describe, load, resolve_model
from train.config import TrainConfig
from train.config.distill import DistillConfig
from train.data.taught import Origin
from train.display.console import say
from train.run.algorithm import Algorithm, Measure
from train.run.program import Program
from train.run.start import read_start
from train.run.taught import read_taught
from train.run.teacher_figures import TeacherFigures
from train.run.training import RunData, Training
from train.run.validation import measured
from train.tasks.scoring import Metric


@dataclass(frozen=True)
class FromTeacher(Algorithm):
    """Learns a teacher's next-token distributions."""

    metric: ClassVar[Metric | None] = "teacher_kl"

    def read_data(self, config: TrainConfig, model: LoadedModel) -> RunData:
        """Read and tokenise the examples, as the student and as the teacher read them; those of evaluations too, so
        that none of them stops the run when it has trained.

        Raises:
            ValueError: a teacher that cannot be, or examples that differ.
        """
        assert isinstance(config, DistillConfig)
        reader = _check_teacher(config, model)
        for split in measured(config):
            read_taught(config, model, reader.config, split)
        return read_taught(config, model, reader.config, "train", by=_origin(config))

    def given(self, training: Training) -> Network:
        """The teacher, placed."""
        config = training.config
        assert isinstance(config, DistillConfig)
        teacher, program = config.teacher, training.program
        loaded = training.loaded
        if teacher.model is not None:
            loaded = load(teacher.model, config.dtype, program.placement.base, tokenizer=config.tokenizer)
            say(f"Teacher: {teacher.model}, {_size(loaded)} beside the student", stderr=False)
        elif config.train_base:
            say(f"Note: the teacher keeps the base as it was, {_size(loaded)} beside the one that trains", stderr=False)
        file = _steering_of(config)
        if file is None:
            return Network(Model(loaded.config, (), attention=program.model.attention), loaded.base, {})
        if said := file.check_weights(loaded.sample, other_base=True):
            say(f"Note: {said}", stderr=False)
        steering = jax.tree.map(jnp.asarray, file.steering)
        model = Model(loaded.config, file.plan, attention=program.model.attention)
        return Network(model, loaded.base, steering if program.mesh is None else program.placement.copies(steering))

    def given_shapes(self, config: TrainConfig, model: LoadedModel, program: Program) -> Network:
        """The teacher, in shapes."""
        assert isinstance(config, DistillConfig)
        theirs, file = _described(config, model), _steering_of(config)
        plan = () if file is None else file.plan
        teacher = Model(theirs.config, plan, attention=program.model.attention)
        return Network(teacher, theirs.base, steering_shapes(plan, theirs.config))

    def measure(self, training: Training) -> Measure:
        """The mean KL from the teacher, and how many of the test questions the teacher answers right."""
        return TeacherFigures(training)


def _check_teacher(config: DistillConfig, model: LoadedModel) -> LoadedModel:
    """The model that is the teacher's base, without its weights; raises ValueError if it cannot teach the student."""
    teacher, theirs = config.teacher, _described(config, model)
    if teacher.model is not None:
        if theirs.config.vocab_size != model.config.vocab_size:
            raise ValueError(
                f"--teacher.model {teacher.model}: has {theirs.config.vocab_size:,} tokens, the student "
                f"{model.config.vocab_size:,}; distributions can be compared over one vocabulary only"
            )
        if theirs.require_tokenizer().get_vocab() != model.require_tokenizer().get_vocab():
            raise ValueError(f"--teacher.model {teacher.model}: has another tokenizer than the student")
    if (file := _steering_of(config)) is not None:
        file.check(theirs.config)
    return theirs


def _described(config: DistillConfig, model: LoadedModel) -> LoadedModel:
    """The teacher's base model without its weights; `model` is the student's."""
    if config.teacher.model is None:
        return model
    return describe(config.teacher.model, config.dtype, tokenizer=config.tokenizer)


def _steering_of(config: DistillConfig) -> SteeringFile | None:
    source = config.teacher.steering
    return None if source is None else read_start(source, option="--teacher.steering")


def _origin(config: DistillConfig) -> Origin:
    """The teacher's steering file and its own base model; a model that is not on this machine goes by its name."""
    file, name = _steering_of(config), config.teacher.model
    digests, files = [], []
    if file is not None:
        digests.append(hashlib.sha256(file.path.read_bytes()).hexdigest())
        files.append(str(file.path))
    if name is not None and (place := Path(resolve_model(name))).exists():
        digests.append(sample_weights(place).digest)
        files.append(name)
    return Origin(" ".join(digests), tuple(files))


def _size(loaded: LoadedModel) -> str:
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.base))
    return f"{count_parameters(loaded.base):,} parameters in {stored / 1e9:,.2f} GB"
