"""What a program takes, without compiling it: memory by part, bytes that move, arithmetic, and the time that follows.

Sizes of the trees are exact, from their shardings. Activations and traffic are a model of the forward and backward
pass; `docs/plans.md` says how far its peaks are from those of compiled programs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from jaxsteer.flops import StepFlops, block_weights, decode_flops, step_flops
from jaxsteer.models.attention import CHUNK, causal_share
from jaxsteer.models.config import ModelConfig
from jaxsteer.objective import CHUNK_TOKENS
from jaxsteer.sharding import AXES
from jaxsteer.types import PyTree
from train.config import TrainConfig
from train.plan.programs import SCHEDULE_STEPS, Which, base_shapes
from train.plan.topology import Chip, Topology
from train.run.program import Program, make_program

FP32 = 4


@dataclass(frozen=True)
class Estimate:
    """Of one chip, in bytes: the most that is in use at one time, by part; what its memory reads and writes, and what
    it sends to others, in one run of the program.
    """

    parts: dict[str, int]
    moved: float
    sent: float

    @property
    def peak(self) -> int:
        """All parts together."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Roofline:
    """The least time of a program, in seconds: its arithmetic, memory traffic and network each at their published peak,
    wholly overlapped.
    """

    arithmetic: float
    memory: float
    network: float

    @property
    def seconds(self) -> float:
        """The slowest of the three."""
        return max(self.arithmetic, self.memory, self.network)

    @property
    def total(self) -> float:
        """The three one after the other: of two programs with the same roofline, the one with less is better."""
        return self.arithmetic + self.memory + self.network

    @property
    def bound(self) -> str:
        """Which of the three it is."""
        return max(("arithmetic", "memory", "network"), key=lambda name: getattr(self, name))


def roofline(flops: float, moved: float, sent: float, chip: Chip, chips: int) -> Roofline:
    """The roofline of a program of so many operations over all chips, and bytes of each chip."""
    return Roofline(flops / (chips * chip.flops), moved / chip.bandwidth, sent / chip.network)


def make_estimated(config: TrainConfig, model_config: ModelConfig, topology: Topology) -> Program:
    """The program of a run on devices that need not be known: for estimates alone.

    Raises:
        ValueError: the config does not fit the model or the devices.
    """
    shape = config.mesh.shape(topology.chips, config.batch_size // config.grad_accumulation)
    mesh = AbstractMesh((shape.data, shape.fsdp, shape.tensor), AXES, axis_types=(AxisType.Auto,) * 3)
    dtype = jnp.float32 if config.dtype == "float32" else jnp.bfloat16
    return make_program(
        config,
        model_config,
        base_shapes(model_config, dtype, quantised=config.quantise == "int8"),
        steps=config.steps or SCHEDULE_STEPS,
        mesh=mesh,  # type: ignore[arg-type]  # only sizes are asked of it
        platform=topology.chip.platform,
    )


def tree_bytes(tree: PyTree) -> int:
    """Bytes of a tree of shapes on one chip."""

    def size(leaf: Any) -> int:
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        width = 8 if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
        return prod(shape) * width

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))


def resident(program: Program) -> dict[str, int]:
    """Bytes on one chip of what lies there all the time."""
    state, frozen = program.shapes
    return {
        "weights": tree_bytes((state.params.base, frozen.base)),
        "steering": tree_bytes((state.params.steering, frozen.steering)),
        "optimizer": tree_bytes(state.opt_state),
    }


@dataclass(frozen=True)
class _Sizes:
    """Of one chip: bytes of an element, the base's parts as they are used (gathered over fsdp, split over tensor)."""

    width: int
    layer: float
    head: float
    fsdp: int
    tensor: int
    row_shards: int

    @property
    def other_fsdp(self) -> float:
        """Share of a gathered array that comes from other chips."""
        return (self.fsdp - 1) / self.fsdp


def _sizes(program: Program) -> _Sizes:
    c, mesh = program.model.config, program.mesh
    data, fsdp, tensor = (1, 1, 1) if mesh is None else (mesh.shape[name] for name in AXES)
    width = program.base["embed"]["embedding"].dtype.itemsize
    stored = program.base["blocks"]["mlp"]["up"]["kernel"].dtype.itemsize
    layer, head = stored * block_weights(c) / tensor, width * c.vocab_size * c.width / tensor
    return _Sizes(width, layer, head, fsdp, tensor, data * fsdp)


def estimate_training(program: Program, config: TrainConfig) -> Estimate:
    """One training step. The remat policy and the batch are the config's, all else the program's."""
    c, s = program.model.config, _sizes(program)
    tokens = (
        config.batch_size // config.grad_accumulation * config.sequence_length / s.row_shards
    )  # of a microbatch, on one chip
    backward = _backward_layers(program)
    stream = c.width / (s.tensor if config.mesh.split_sequence else 1)
    into = 1 + c.gated  # projections into the MLP
    projected = ((c.heads + 2 * c.kv_heads) * c.head_dim + into * c.mlp_width) / s.tensor
    # ---- what the backward pass waits for, a token and layer
    kept = {
        "full": stream,
        "selective": 3 * stream + projected,
        "none": 7 * stream + 2 * projected + 2 * c.heads * c.head_dim / s.tensor,
    }[config.remat]
    saved = tokens * kept * s.width * backward
    # ---- the two moments of most use: at the loss, and in a block's backward pass
    gathered = s.fsdp > 1
    chunk = min(tokens, CHUNK_TOKENS)
    at_loss = s.head * gathered + 2 * chunk * c.vocab_size / s.tensor * FP32 + tokens * c.width * (FP32 + s.width)
    in_block = s.layer * gathered + tokens * (3 * c.mlp_width / s.tensor + 6 * c.width) * s.width
    in_block += tokens * _score_bytes(program, config) / s.tensor
    trained = tree_bytes(program.shapes[0].params)
    parts = resident(program) | {
        "gradients": trained * (2 if config.grad_accumulation > 1 else 1),
        "saved activations": int(saved),
        "temporaries": int(max(at_loss, in_block)),
    }

    # ---- traffic of a step
    again = {"none": 0, "selective": 0.3, "full": 1}[config.remat]
    passes = c.layers + backward
    step_tokens, times = tokens * config.grad_accumulation, config.grad_accumulation
    a_pass = step_tokens * (12 * c.width + (4 * c.mlp_width + 2 * projected) / s.tensor) * s.width
    moved = times * (passes + again * backward) * s.layer * (3 if gathered else 1)
    moved += a_pass * (c.layers + backward * (2 + again)) + 3 * step_tokens * c.vocab_size / s.tensor * FP32
    moved += 2 * saved * times + 6 * trained
    sent = times * s.other_fsdp * (passes * s.layer + s.head) + 2 * trained
    reduced = 2 * step_tokens * c.width * s.width * (s.tensor - 1) / s.tensor
    sent += 2 * reduced * (c.layers + backward * (1 + again)) + step_tokens * c.width * s.width * s.other_fsdp
    return Estimate(parts, moved, sent)


def estimate_decoding(program: Program, config: TrainConfig, prompt_length: int) -> Estimate:
    """A prefill of `eval_batch_size` prompts and all new tokens."""
    c, s = program.model.config, _sizes(program)
    new, rows = config.task.max_new_tokens, max(1.0, config.eval_batch_size / s.row_shards)
    slots = prompt_length + new - 1
    cache = cache_bytes(program, config, prompt_length)
    tokens = rows * prompt_length
    gathered = s.fsdp > 1
    prefill = s.layer * gathered + tokens * (3 * c.mlp_width / s.tensor + 6 * c.width) * s.width
    prefill += 2 * tokens * slots * c.heads / s.tensor * FP32  # scores of queries on the cache
    at_head = s.head * gathered + 2 * rows * c.vocab_size / s.tensor * FP32
    parts = {name: size for name, size in resident(program).items() if name != "optimizer"}
    parts |= {"cache": cache, "temporaries": int(max(prefill, at_head))}
    weights = (c.layers * s.layer + s.head) * new
    moved = weights * (3 if gathered else 1) + cache * new
    sent = weights * s.other_fsdp
    sent += (new * rows + tokens) * 4 * c.layers * c.width * s.width * (s.tensor - 1) / s.tensor
    return Estimate(parts, moved, sent)


def cache_bytes(program: Program, config: TrainConfig, prompt_length: int) -> int:
    """The cache of keys and values on one chip."""
    c, s = program.model.config, _sizes(program)
    rows = config.eval_batch_size / (s.row_shards if config.eval_batch_size % s.row_shards == 0 else 1)
    slots = prompt_length + config.task.max_new_tokens - 1
    return int(2 * c.layers * rows * slots * c.kv_heads * c.head_dim / s.tensor * s.width)


def estimate(which: Which, program: Program, config: TrainConfig, prompt_length: int) -> Estimate:
    """Of a run's training step, or of decoding."""
    return estimate_training(program, config) if which == "train" else estimate_decoding(program, config, prompt_length)


def flops_of(which: Which, program: Program, config: TrainConfig, prompt_length: int) -> StepFlops:
    """Arithmetic of one run of a program, over all chips; in training, every position of full rows is supervised."""
    if which == "decode":
        return decode_flops(program.model.config, config.eval_batch_size, prompt_length, config.task.max_new_tokens)
    model = replace(program.model, remat=config.remat)
    share = causal_share(config.sequence_length, program.attention[0])
    rows, length = config.batch_size, config.sequence_length
    return step_flops(model, rows, length, rows * length, causal_share=share)


def _backward_layers(program: Program) -> int:
    """Layers that a gradient passes through."""
    layers = program.model.config.layers
    first = min((layer for slot in program.model.plan for layer in slot.active_layers(layers)), default=0)
    return layers if program.model.train_base else layers - first


def _score_bytes(program: Program, config: TrainConfig) -> float:
    """Bytes of attention scores that exist at one time, a token, all heads of all chips."""
    queries = {"dense": config.sequence_length, "chunked": min(CHUNK, config.sequence_length)}.get(
        program.attention[0], 0
    )
    return 2 * queries * program.model.config.heads * FP32
