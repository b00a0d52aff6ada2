"""A run's compiled steps, built from shapes alone: the training step and decoding, for devices that are not here."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace
from functools import lru_cache

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, Mesh
from jax.stages import Lowered

from jaxsteer.inference.generate import generate_program
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.quantise import quantise
from jaxsteer.models.transformer import Network, init_base
from jaxsteer.params import combine
from jaxsteer.sharding import AXES, batch_shardings
from jaxsteer.types import Array, Batch, PyTree
from train.config import TrainConfig
from train.plan.hlo import Collectives, collectives
from train.plan.question import Question
from train.plan.topology import GIB, Topology
from train.run.program import Program, make_program, mesh_of

SCHEDULE_STEPS = 1000
"""Length of the learning-rate schedule if the config gives none: it would follow from the data, which is not read."""

STOP_TOKEN = 0
"""Any token will do: the compiled step does not depend on which one ends an answer."""


@dataclass(frozen=True)
class Compiled:
    """What the compiler reports.

    peak         bytes on one chip: arguments plus temporaries, at their maximum
    collectives  by kind
    seconds      spent compiling
    """

    peak: int
    collectives: Collectives
    seconds: float


@dataclass(frozen=True)
class TooBig:
    """The compiler ran out of device memory.

    needed   bytes on one chip; 0 if the compiler does not say
    message  the compiler's own
    seconds  spent compiling
    """

    needed: int
    message: str
    seconds: float


@lru_cache
def base_shapes(
    model_config: ModelConfig, dtype: type[jnp.floating] = jnp.bfloat16, *, quantised: bool = False
) -> PyTree:
    """A model's base tree as `jax.ShapeDtypeStruct`s."""

    def make(key: Array) -> PyTree:
        base = init_base(model_config, key, dtype)
        return quantise(base) if quantised else base

    return jax.eval_shape(make, jax.random.key(0))


def estimation_mesh(question: Question) -> AbstractMesh:
    """A mesh that has sizes but no devices: enough for shapes and shardings, not for compiling."""
    shape = question.config.mesh.shape(question.topology.chips, question.microbatch)
    return AbstractMesh((shape.data, shape.fsdp, shape.tensor), AXES, axis_types=(AxisType.Auto,) * 3)


def compilation_mesh(question: Question) -> Mesh | None:
    """The mesh of the topology's own devices, as libtpu describes them.

    Raises:
        ValueError: the mesh does not fit the devices, or libtpu is not installed.
    """
    return mesh_of(question.config, tpu_devices(question.topology))


def build_program(question: Question, mesh: Mesh | AbstractMesh | None) -> Program:
    """The program of the question's run on a mesh of its topology, from shapes alone.

    Raises:
        ValueError: the config does not fit the model or the mesh.
    """
    config = question.config
    dtype = jnp.float32 if config.dtype == "float32" else jnp.bfloat16
    return make_program(
        config,
        question.model_config,
        base_shapes(question.model_config, dtype, quantised=config.quantise == "int8"),
        steps=config.steps or SCHEDULE_STEPS,
        mesh=mesh,  # type: ignore[arg-type]  # of an AbstractMesh only the sizes are used
        platform=question.topology.chip.platform,
    )


def tpu_devices(topology: Topology) -> list[jax.Device]:
    """The devices of a TPU topology, as the compiler describes them.

    Raises:
        ValueError: libtpu is not installed, or cannot compile for the topology.
    """
    slices = {"num_slices": topology.slices} if topology.slices > 1 else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **slices).devices)
    except Exception as error:  # of several types, all meaning the same
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"cannot compile for {topology.name} here: {reason}. "
            'The compiler is libtpu, in the extra "tpu": pip install -e ".[train,tpu]"'
        ) from None


def lower_training(program: Program, config: TrainConfig) -> Lowered:
    """Lower the training step for the program's mesh."""
    batch_shape: tuple[int, ...] = (config.batch_size, config.sequence_length)
    if config.grad_accumulation > 1:
        microbatch = config.batch_size // config.grad_accumulation
        batch_shape = (config.grad_accumulation, microbatch, config.sequence_length)
    with program.on_mesh():
        state, frozen = program.shapes
        return program.jitted.lower(state, _batch_shapes(batch_shape, program), frozen)


def lower_decoding(program: Program, config: TrainConfig, prompt_length: int) -> Lowered:
    """Lower decoding as evaluation does it: prefill `eval_batch_size` prompts, then generate with a KV cache."""
    state, frozen = program.shapes
    params = combine(state.params, frozen)
    with program.on_mesh():
        return generate_program.lower(
            Network(replace(program.model, train_base=False), params.base, params.steering),
            _batch_shapes((config.eval_batch_size, prompt_length), program),
            jax.eval_shape(lambda: jax.random.key(0)),
            None,
            {},
            max_new_tokens=config.task.max_new_tokens,
            stop_tokens=(STOP_TOKEN,),
        )


def compile_lowered(lowered: Lowered, unknown_trips: int = 1) -> Compiled | TooBig:
    """Compile, and read memory and collectives off the result.

    Args:
        unknown_trips: trip count to assume for loops whose end depends on data.
    """
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        message = str(error).partition("\n")[0]
        return TooBig(_needed_bytes(message), message, time.perf_counter() - start)
    seconds = time.perf_counter() - start
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None
    assert text is not None
    return Compiled(memory.peak_memory_in_bytes, collectives(text, unknown_trips), seconds)


def compile_step(question: Question) -> Compiled | TooBig:
    """Compile the step that a question is about.

    Raises:
        ValueError: the config does not fit the model or the devices, or libtpu is not installed.
    """
    program, config = build_program(question, compilation_mesh(question)), question.config
    if question.which == "train":
        lowered = lower_training(program, config)
    else:
        lowered = lower_decoding(program, config, question.prompt_length)
    return compile_lowered(lowered, max(1, config.task.max_new_tokens - 1))


def _batch_shapes(shape: tuple[int, ...], program: Program) -> Batch:
    """A batch as `jax.ShapeDtypeStruct`s, with shardings where there is a mesh."""
    dtypes = Batch(jnp.int32, jnp.int32, jnp.int32, jnp.int32, jnp.bool_, jnp.float32)
    batch = jax.tree.map(lambda dtype: jax.ShapeDtypeStruct(shape, dtype), dtypes)
    if program.mesh is None:
        return batch
    shardings = batch_shardings(batch, program.mesh)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), batch, shardings
    )


def _needed_bytes(message: str) -> int:
    """The bytes in "... (25.46G) exceeds available HBM (15.75G)"."""
    match = re.search(r"([\d.]+)([KMGT])\)? exceeds", message) or re.search(r"Used ([\d.]+)([KMGT]) of", message)
    scale = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
    return int(float(match[1]) * scale[match[2]]) if match else 0
