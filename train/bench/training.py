"""The training benchmark: speed, memory and achieved arithmetic of a training step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.flops import step_flops
from jaxsteer.inference.generate import to_device
from jaxsteer.io import LoadedModel
from jaxsteer.models.attention import causal_share
from jaxsteer.models.transformer import Remat
from jaxsteer.objectives.supervised import supervised_loss
from jaxsteer.objectives.tokens import next_tokens
from jaxsteer.params import Params, partition
from jaxsteer.ranges import Count, check_ranges
from jaxsteer.steering import init_steering
from jaxsteer.training import init_state
from jaxsteer.types import Batch
from train.base_models import check_plan, load
from train.config import TrainConfig
from train.data import DataSource, Encoding, Keys, ListOps, TokenizedExample, encode, read_jsonl
from train.data.listops import generate as generate_listops
from train.devices.machine import matmul_peak_flops, peak_memory_bytes
from train.devices.placement import SINGLE
from train.run.program import Program, make_program


@dataclass(frozen=True)
class TrainBench:
    """Time training steps: speed, packing, achieved arithmetic, memory, compile and load time."""

    model: str = "smollm2-135m-instruct"
    """Local folder, .gguf file or Hugging Face id of the base model, or smollm2-135m-instruct."""
    plan: tuple[str, ...] = ("nonlinear(rank=8) @ block",)
    """Steering plan: what is steered at which sites."""
    train_base: bool = False
    """Full fine-tuning: train the base weights too."""
    batch_size: Count = 8
    """Number of packed rows per batch."""
    sequence_length: Count = 256
    """Length of each row in tokens."""
    data: str = "dense"
    """dense (random tokens, a loss at every position), listops, or a JSONL file of prompts and completions."""
    keys: Keys = field(default_factory=Keys)
    """Field names in the JSONL file."""
    steps: Count = 5
    """Number of steps to time; the medians are reported."""
    remat: Remat = "selective"
    """What the backward pass recomputes instead of storing it."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the weights and the compute; auto: float32 on CPU, bfloat16 on accelerators."""
    quantise: Literal["none", "int8"] = "none"
    """Quantise the projections of the frozen base to int8."""
    json: str | None = None
    """Write the figures to this file."""

    def __post_init__(self) -> None:
        """Reject settings that nothing can be measured with."""
        check_ranges(self)


class _Step(NamedTuple):
    """One timed step: seconds, tokens without padding, examples, and its arithmetic in FLOP."""

    seconds: float
    tokens: int
    examples: int
    useful: float
    executed: float


def bench_train(config: TrainBench) -> dict[str, float]:
    """Run the training benchmark and return its figures."""
    check_plan(config.model, config.plan)
    began = time.perf_counter()
    loaded = load(config.model, config.dtype, quantised=config.quantise == "int8")
    load_seconds = time.perf_counter() - began
    settings = TrainConfig(
        plan=config.plan,
        train_base=config.train_base,
        remat=config.remat,
        batch_size=config.batch_size,
        sequence_length=config.sequence_length,
        mesh=SINGLE,
    )
    program = make_program(settings, loaded.config, loaded.base, steps=1000)
    params = Params(loaded.base, init_steering(program.model.plan, loaded.config, jax.random.key(0), base=loaded.base))
    source = _source(config, loaded)
    loss = _mean_loss(program, params, to_device(source.batch(0)))

    trained, frozen = partition(params, program.labels)
    state = init_state(jax.tree.map(jnp.copy, trained), program.tx, jax.random.key(1))  # the step donates its state
    began = time.perf_counter()
    compiled = program.jitted.lower(state, to_device(source.batch(0)), frozen).compile()
    compile_seconds = time.perf_counter() - began
    steps = _time_steps(config, program, source, lambda state, batch: compiled(state, batch, frozen)[0], state)

    peak = matmul_peak_flops(loaded.base["embed"]["embedding"].dtype)
    median = lambda figure: statistics.median(map(figure, steps))
    executed = median(lambda step: step.executed / step.seconds)
    return {
        "seconds per step": median(lambda step: step.seconds),
        "tokens/s": median(lambda step: step.tokens / step.seconds),
        "examples/s": median(lambda step: step.examples / step.seconds),
        "tokens that are not padding, %": 100 * source.fill,
        "useful GFLOP/s": median(lambda step: step.useful / step.seconds) / 1e9,
        "executed GFLOP/s": executed / 1e9,
        "matmul peak, GFLOP/s": peak / 1e9,
        "executed / peak, %": 100 * executed / peak,
        "loss before training": loss,
        "weights, GB": sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.base)) / 1e9,
        "peak memory, GB": peak_memory_bytes() / 1e9,
        "load, s": load_seconds,
        "compile, s": compile_seconds,
    }


def _mean_loss(program: Program, params: Params, batch: Batch) -> float:
    """Loss per unit of target weight, in nats."""
    total = jax.jit(supervised_loss, static_argnums=0)(program.model, params.base, params.steering, batch)
    return float(total) / float(next_tokens(batch).weights.sum())


def _time_steps(
    config: TrainBench, program: Program, source: DataSource, step: Callable[[Any, Batch], Any], state: Any
) -> list[_Step]:
    """Time `config.steps` steps on successive batches, after one that touches the memory for the first time."""
    share = causal_share(config.sequence_length, program.attention[0])
    state = jax.block_until_ready(step(state, to_device(source.batch(0))))
    timed = []
    for number in range(1, config.steps + 1):
        host = source.batch(number)
        batch = to_device(host)
        began = time.perf_counter()
        state = jax.block_until_ready(step(state, batch))
        seconds = time.perf_counter() - began
        targets = int((np.asarray(next_tokens(batch).weights) != 0).sum())
        flops = step_flops(program.model, config.batch_size, config.sequence_length, targets, causal_share=share)
        tokens, examples = int((host.segments > 0).sum()), int(host.segments.max(axis=1).sum())
        timed.append(_Step(seconds, tokens, examples, flops.useful, flops.executed))
    return timed


def _source(config: TrainBench, loaded: LoadedModel) -> DataSource:
    """Batches of the data asked for."""
    if config.data == "dense":
        generator = np.random.default_rng(0)
        shape = (config.batch_size * (config.steps + 1), config.sequence_length)
        tokens = generator.integers(0, loaded.config.vocab_size, shape).astype(np.int32)
        everywhere = np.ones(config.sequence_length, bool)
        examples = [TokenizedExample(ids, everywhere, 1, "dense") for ids in tokens]
    else:
        listops = config.data == "listops"
        texts = generate_listops(ListOps(), "train") if listops else read_jsonl(config.data, config.keys)
        encoding = Encoding(max_length=config.sequence_length, on_long="drop")
        examples, _ = encode(texts, loaded.require_tokenizer(), encoding)
    return DataSource(examples, config.batch_size, config.sequence_length)
