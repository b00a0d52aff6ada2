"""What a compiled step needs, estimated without compiling: memory by part, traffic, arithmetic, and time.

Sizes of the trees are exact, from their shardings. Activations and traffic come from a model of the forward and
backward pass; `docs/plans.md` compares its peaks with those of compiled steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import jax
from jax.sharding import NamedSharding

from jaxsteer.flops import StepFlops, block_weights, decode_flops, step_flops
from jaxsteer.models.attention import CHUNK, causal_share
from jaxsteer.objectives.tokens import CHUNK_TOKENS
from jaxsteer.sharding import AXES
from jaxsteer.types import PyTree
from train.config import TrainConfig
from train.plan.programs import build_program, estimation_mesh
from train.plan.question import Question
from train.plan.topology import Chip
from train.run.program import Program

FP32_BYTES = 4


@dataclass(frozen=True)
class Estimate:
    """What one run of a compiled step needs on one chip, in bytes.

    parts   memory in use at the peak, by what uses it
    moved   read from and written to the chip's memory
    sent    sent to other chips
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
    """Lower bounds on the time of a compiled step, in seconds, at the chips' published peaks.

    arithmetic, memory, network   each alone; the step takes at least the longest, if all three overlap perfectly
    """

    arithmetic: float
    memory: float
    network: float

    @property
    def seconds(self) -> float:
        """The longest of the three: perfect overlap."""
        return max(self.arithmetic, self.memory, self.network)

    @property
    def total(self) -> float:
        """The sum of the three: no overlap. Breaks ties between steps with the same roofline."""
        return self.arithmetic + self.memory + self.network

    @property
    def bound(self) -> str:
        """The name of the longest."""
        return max(("arithmetic", "memory", "network"), key=lambda name: getattr(self, name))


def roofline(flops: float, estimate: Estimate, chip: Chip, chips: int) -> Roofline:
    """The roofline of `flops` operations, shared by all chips, and each chip's traffic."""
    return Roofline(flops / (chips * chip.flops), estimate.moved / chip.bandwidth, estimate.sent / chip.network)


def estimated_program(question: Question) -> Program:
    """The program of the question's run on a mesh without devices: for estimates, not for compiling.

    Raises:
        ValueError: the config does not fit the model or the topology.
    """
    return build_program(question, estimation_mesh(question))


def tree_bytes(tree: PyTree) -> int:
    """Bytes that one chip holds of a tree of `jax.ShapeDtypeStruct`s."""

    def leaf_bytes(leaf: jax.ShapeDtypeStruct) -> int:
        sharding: NamedSharding | None = leaf.sharding
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        itemsize = 8 if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
        return prod(shape) * itemsize

    return sum(leaf_bytes(leaf) for leaf in jax.tree.leaves(tree))


def resident(program: Program) -> dict[str, int]:
    """Bytes that stay on one chip throughout training."""
    state, frozen = program.shapes
    return {
        "weights": tree_bytes((state.params.base, frozen.base)),
        "steering": tree_bytes((state.params.steering, frozen.steering)),
        "optimizer": tree_bytes(state.opt_state),
    }


@dataclass(frozen=True)
class _Sizes:
    """Sizes on one chip, with the base as it is used: gathered over `fsdp`, split over `tensor`.

    itemsize      bytes per element of the activations
    layer, head   bytes of one block's and of the vocabulary's weights
    fsdp, tensor  sizes of these mesh axes
    row_shards    parts that the rows of a batch are split into
    """

    itemsize: int
    layer: float
    head: float
    fsdp: int
    tensor: int
    row_shards: int

    @property
    def gathered(self) -> bool:
        """Whether weights have to be gathered before use."""
        return self.fsdp > 1

    @property
    def remote_share(self) -> float:
        """Share of a gathered weight that comes from other chips."""
        return (self.fsdp - 1) / self.fsdp


def _sizes(program: Program) -> _Sizes:
    c, mesh = program.model.config, program.mesh
    data, fsdp, tensor = (1, 1, 1) if mesh is None else (mesh.shape[name] for name in AXES)
    itemsize = program.base["embed"]["embedding"].dtype.itemsize
    stored_itemsize = program.base["blocks"]["mlp"]["up"]["kernel"].dtype.itemsize
    layer = stored_itemsize * block_weights(c) / tensor
    head = itemsize * c.vocab_size * c.width / tensor
    return _Sizes(itemsize, layer, head, fsdp, tensor, data * fsdp)


def estimate_training(program: Program, config: TrainConfig) -> Estimate:
    """One training step. The remat policy and the batch are taken from `config`, everything else from `program`."""
    c, s = program.model.config, _sizes(program)
    microbatches = config.grad_accumulation
    tokens = config.batch_size // microbatches * config.sequence_length / s.row_shards  # of a microbatch, on one chip
    backward = _backward_layers(program)
    projected = ((c.heads + 2 * c.kv_heads) * c.head_dim + (1 + c.gated) * c.mlp_width) / s.tensor

    # ---- memory: activations saved for the backward pass, then the larger of two peaks, at the loss or inside a block
    saved = tokens * _saved_per_token(program, config, projected) * s.itemsize * backward
    chunk = min(tokens, CHUNK_TOKENS)
    at_loss = s.head * s.gathered + 2 * chunk * c.vocab_size / s.tensor * FP32_BYTES
    at_loss += tokens * c.width * (FP32_BYTES + s.itemsize)
    in_block = s.layer * s.gathered + tokens * (3 * c.mlp_width / s.tensor + 6 * c.width) * s.itemsize
    in_block += tokens * _score_bytes(program, config) / s.tensor
    trained = tree_bytes(program.shapes[0].params)
    parts = resident(program) | {
        "gradients": trained * (2 if microbatches > 1 else 1),
        "saved activations": int(saved),
        "temporaries": int(max(at_loss, in_block)),
    }

    # ---- traffic of the whole step
    recomputed = {"none": 0, "selective": 0.3, "full": 1}[config.remat]  # share of a forward pass
    layer_passes = c.layers + backward
    step_tokens = tokens * microbatches
    activations = step_tokens * (12 * c.width + (4 * c.mlp_width + 2 * projected) / s.tensor) * s.itemsize
    moved = microbatches * (layer_passes + recomputed * backward) * s.layer * (3 if s.gathered else 1)
    moved += activations * (c.layers + backward * (2 + recomputed))
    moved += 3 * step_tokens * c.vocab_size / s.tensor * FP32_BYTES
    moved += 2 * saved * microbatches + 6 * trained
    sent = microbatches * s.remote_share * (layer_passes * s.layer + s.head) + 2 * trained
    reduced = 2 * step_tokens * c.width * s.itemsize * (s.tensor - 1) / s.tensor
    sent += 2 * reduced * (c.layers + backward * (1 + recomputed))
    sent += step_tokens * c.width * s.itemsize * s.remote_share
    return Estimate(parts, moved, sent)


def _saved_per_token(program: Program, config: TrainConfig, projected: float) -> float:
    """Elements that a layer saves for the backward pass per token, on one chip."""
    c, tensor = program.model.config, _sizes(program).tensor
    residual = c.width / (tensor if config.mesh.split_sequence else 1)
    return {
        "full": residual,
        "selective": 3 * residual + projected,
        "none": 7 * residual + 2 * projected + 2 * c.heads * c.head_dim / tensor,
    }[config.remat]


def estimate_decoding(program: Program, config: TrainConfig, prompt_length: int) -> Estimate:
    """Prefilling `eval_batch_size` prompts and generating all new tokens."""
    c, s = program.model.config, _sizes(program)
    new_tokens, rows = config.task.max_new_tokens, max(1.0, config.eval_batch_size / s.row_shards)
    slots = prompt_length + new_tokens - 1
    cache = cache_bytes(program, config, prompt_length)
    tokens = rows * prompt_length
    in_prefill = s.layer * s.gathered + tokens * (3 * c.mlp_width / s.tensor + 6 * c.width) * s.itemsize
    in_prefill += 2 * tokens * slots * c.heads / s.tensor * FP32_BYTES  # scores of the queries on the cache
    at_head = s.head * s.gathered + 2 * rows * c.vocab_size / s.tensor * FP32_BYTES
    parts = decoding_resident(program, config, prompt_length)
    parts |= {"temporaries": int(max(in_prefill, at_head))}
    weights = (c.layers * s.layer + s.head) * new_tokens
    moved = weights * (3 if s.gathered else 1) + cache * new_tokens
    sent = weights * s.remote_share
    sent += (new_tokens * rows + tokens) * 4 * c.layers * c.width * s.itemsize * (s.tensor - 1) / s.tensor
    return Estimate(parts, moved, sent)


def decoding_resident(program: Program, config: TrainConfig, prompt_length: int) -> dict[str, int]:
    """Bytes that stay on one chip throughout decoding: no optimizer, but the KV cache."""
    parts = {name: size for name, size in resident(program).items() if name != "optimizer"}
    return parts | {"cache": cache_bytes(program, config, prompt_length)}


def cache_bytes(program: Program, config: TrainConfig, prompt_length: int) -> int:
    """Bytes of the KV cache on one chip."""
    c, s = program.model.config, _sizes(program)
    rows = config.eval_batch_size / (s.row_shards if config.eval_batch_size % s.row_shards == 0 else 1)
    slots = prompt_length + config.task.max_new_tokens - 1
    return int(2 * c.layers * rows * slots * c.kv_heads * c.head_dim / s.tensor * s.itemsize)


def estimate(question: Question, program: Program) -> Estimate:
    """The estimate of the step that the question is about.

    Args:
        program: from `estimated_program`; may be that of another remat policy, which only `question.config` decides.
    """
    if question.which == "train":
        return estimate_training(program, question.config)
    return estimate_decoding(program, question.config, question.prompt_length)


def flops_of(question: Question, program: Program) -> StepFlops:
    """Arithmetic of one run of the step, over all chips. In training, rows are full and every position supervised."""
    config = question.config
    if question.which == "decode":
        new_tokens = config.task.max_new_tokens
        return decode_flops(program.model.config, config.eval_batch_size, question.prompt_length, new_tokens)
    model = replace(program.model, remat=config.remat)
    share = causal_share(config.sequence_length, program.attention[0])
    rows, length = config.batch_size, config.sequence_length
    return step_flops(model, rows, length, rows * length, causal_share=share)


def _backward_layers(program: Program) -> int:
    """Number of layers that a gradient passes through."""
    layers = program.model.config.layers
    first = min((layer for slot in program.model.plan for layer in slot.active_layers(layers)), default=0)
    return layers if program.model.train_base else layers - first


def _score_bytes(program: Program, config: TrainConfig) -> float:
    """Bytes of attention scores in memory at one time, per token, over the heads of all chips."""
    length = config.sequence_length
    queries = {"dense": length, "chunked": min(CHUNK, length)}.get(program.attention[0], 0)
    return 2 * queries * program.model.config.heads * FP32_BYTES
