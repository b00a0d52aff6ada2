"""A run's programs for devices that are not here: the training step and decoding, lowered from shapes and compiled."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from jaxsteer.inference.generate import generate
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.quantise import quantise
from jaxsteer.models.transformer import init_base
from jaxsteer.params import combine
from jaxsteer.sharding import batch_shardings
from jaxsteer.types import Batch, PyTree
from train.config import TrainConfig
from train.plan.hlo import Collectives, collectives
from train.plan.topology import GIB, Topology
from train.run.program import Program, make_program, mesh_of

Which = Literal["train", "decode"]

SCHEDULE_STEPS = 1000
"""Length of the schedules where the config does not say: it depends on data, which a plan does without."""

STOP = 0
"""Any token: the programs are the same whichever ends a reply."""


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program. Bytes are of one chip, peak = arguments + temporaries at their most."""

    peak: int
    collectives: Collectives
    seconds: float


@dataclass(frozen=True)
class TooBig:
    """The compiler could not fit a program: bytes that it wanted (0 where it does not say), and its words."""

    needed: int
    words: str
    seconds: float


@lru_cache
def base_shapes(model_config: ModelConfig, dtype: Any = jnp.bfloat16, *, quantised: bool = False) -> PyTree:
    """The base tree of a model as `jax.ShapeDtypeStruct`s."""
    make = lambda key: init_base(model_config, key, dtype)
    return jax.eval_shape((lambda key: quantise(make(key))) if quantised else make, jax.random.key(0))


def batch_shapes(config: TrainConfig, program: Program) -> Batch:
    """The batch of a training step as shapes, with their shardings where there is a mesh."""
    shape: tuple[int, ...] = (config.batch_size, config.sequence_length)
    if config.grad_accumulation > 1:
        shape = (config.grad_accumulation, config.batch_size // config.grad_accumulation, config.sequence_length)
    return _rows(shape, program)


def make_planned(config: TrainConfig, model_config: ModelConfig, topology: Topology) -> Program:
    """The program of a run on a topology's devices.

    Raises:
        ValueError: the config does not fit the model or the devices; there is no libtpu.
    """
    devices = tpu_devices(topology)
    dtype = jnp.float32 if config.dtype == "float32" else jnp.bfloat16
    return make_program(
        config,
        model_config,
        base_shapes(model_config, dtype, quantised=config.quantise == "int8"),
        steps=config.steps or SCHEDULE_STEPS,
        mesh=mesh_of(config, devices),
        platform=topology.chip.platform,
    )


def tpu_devices(topology: Topology) -> list[Any]:
    """The compiler's devices of a TPU topology.

    Raises:
        ValueError: libtpu is not installed, or cannot compile for the topology.
    """
    slices = {"num_slices": topology.slices} if topology.slices > 1 else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **slices).devices)
    except Exception as error:  # several kinds, for one outcome
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"cannot compile for {topology.name} here: {reason}. "
            'The compiler is libtpu, in the extra "tpu": pip install -e ".[train,tpu]"'
        ) from None


def lower_training(program: Program, config: TrainConfig) -> Any:
    """The training step, lowered for the program's mesh."""
    with program.on_mesh():
        state, frozen = program.shapes
        return program.jitted.lower(state, batch_shapes(config, program), frozen)


def lower_decoding(program: Program, config: TrainConfig, prompt_length: int) -> Any:
    """Decoding as evaluation does it: a prefill of `eval_batch_size` prompts, then cached steps; lowered."""
    state, frozen = program.shapes
    whole = combine(state.params, frozen)
    model = replace(program.model, train_base=False)
    with program.on_mesh():
        return generate.lower(
            model,
            whole.base,
            whole.steering,
            _rows((config.eval_batch_size, prompt_length), program),
            max_new_tokens=config.task.max_new_tokens,
            stop_tokens=(STOP,),
        )


def compile_lowered(lowered: Any, other_trips: int = 1) -> Compiled | TooBig:
    """Compile, and read what it takes.

    Args:
        other_trips: how often loops run whose end depends on data.
    """
    began = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        words = str(error).partition("\n")[0]
        return TooBig(_needed(words), words, time.perf_counter() - began)
    seconds = time.perf_counter() - began
    peak = compiled.memory_analysis().peak_memory_in_bytes
    return Compiled(peak, collectives(compiled.as_text(), other_trips), seconds)


def compile_for(
    which: Which, config: TrainConfig, model_config: ModelConfig, topology: Topology, prompt_length: int
) -> tuple[Program, Compiled | TooBig]:
    """Compile one of a run's programs for a topology."""
    program = make_planned(config, model_config, topology)
    lower: dict[str, Callable[[], Any]] = {
        "train": lambda: lower_training(program, config),
        "decode": lambda: lower_decoding(program, config, prompt_length),
    }
    return program, compile_lowered(lower[which](), max(1, config.task.max_new_tokens - 1))


def _rows(shape: tuple[int, ...], program: Program) -> Batch:
    kinds = Batch(jnp.int32, jnp.int32, jnp.int32, jnp.int32, jnp.bool_, jnp.float32)
    batch = jax.tree.map(lambda dtype: jax.ShapeDtypeStruct(shape, dtype), kinds)
    if program.mesh is None:
        return batch
    where = batch_shardings(batch, program.mesh)
    return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), batch, where)


def _needed(words: str) -> int:
    """Bytes in "... (25.46G) exceeds available HBM (15.75G)"."""
    found = re.search(r"([\d.]+)([KMGT])\)? exceeds", words) or re.search(r"Used ([\d.]+)([KMGT]) of", words)
    scale = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
    return int(float(found[1]) * scale[found[2]]) if found else 0
