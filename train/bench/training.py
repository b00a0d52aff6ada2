"""Benchmark of training: speed, memory and achieved arithmetic."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.flops import step_flops
from jaxsteer.models.attention import causal_share
from jaxsteer.models.transformer import Remat
from jaxsteer.objective import next_tokens, supervised_loss
from jaxsteer.params import Params, partition
from jaxsteer.steering import init_steering
from jaxsteer.training import init_state
from jaxsteer.types import Batch
from train.base_models import load
from train.config import TrainConfig
from train.data import DataSource, Keys, ListOps, TokenizedExample, encode, read_jsonl
from train.data.listops import generate as generate_listops
from train.devices.machine import matmul_peak_flops, peak_memory_bytes
from train.devices.placement import SINGLE
from train.run.program import make_program


@dataclass(frozen=True)
class TrainBench:
    """Time training steps: speed, packing, achieved arithmetic, memory, compile and load time."""

    model: str = "smollm2-135m-instruct"
    """A local folder or .gguf file, a Hugging Face id, or smollm2-135m-instruct."""
    plan: tuple[str, ...] = ("nonlinear(rank=8) @ block",)
    """What is steered where."""
    train_base: bool = False
    """Full fine-tuning."""
    batch_size: int = 8
    """Rows of a batch."""
    sequence_length: int = 256
    """Tokens of a row."""
    data: str = "dense"
    """dense: random tokens, every position supervised; listops; or a JSONL file with prompts and completions."""
    keys: Keys = field(default_factory=Keys)
    """Field names in the JSONL file."""
    steps: int = 5
    """Steps to time; the median counts."""
    remat: Remat = "selective"
    """What the backward pass recomputes."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the weights and the compute."""
    quantise: Literal["none", "int8"] = "none"
    """int8: of the frozen base's projections."""
    json: str | None = None
    """Write the figures to this file."""


def bench_train(config: TrainBench) -> dict[str, float]:
    """Run the training benchmark and return its figures."""
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
    model, tx = program.model, program.tx
    params = Params(loaded.base, init_steering(model.plan, loaded.config, jax.random.key(0), base=loaded.base))
    trained, frozen = partition(params, program.labels)
    trained = jax.tree.map(jnp.copy, trained)  # the step donates its state
    state = init_state(trained, tx, jax.random.key(1))
    source = _source(config, loaded)

    step, batch = program.jitted, _device(source.batch(0))
    losses = jax.jit(supervised_loss, static_argnums=0)(model, loaded.base, params.steering, batch)
    loss = float(losses) / float(next_tokens(batch).weights.sum())
    began = time.perf_counter()
    compiled = step.lower(state, batch, frozen).compile()
    compile_seconds = time.perf_counter() - began
    state, _ = jax.block_until_ready(compiled(state, batch, frozen))  # the first run touches the memory

    peak = matmul_peak_flops(loaded.base["embed"]["embedding"].dtype)
    seconds, tokens, examples, flops = [], [], [], []
    for k in range(1, config.steps + 1):
        host = source.batch(k)
        batch = _device(host)
        began = time.perf_counter()
        state, _ = jax.block_until_ready(compiled(state, batch, frozen))
        seconds.append(time.perf_counter() - began)
        tokens.append(int((host.segments > 0).sum()))
        examples.append(int(host.segments.max(axis=1).sum()))
        supervised = int((np.asarray(next_tokens(batch).weights) != 0).sum())
        share = causal_share(config.sequence_length, program.attention[0])
        flops.append(step_flops(model, config.batch_size, config.sequence_length, supervised, causal_share=share))
    middle = statistics.median
    speed = middle([f.executed / s for f, s in zip(flops, seconds, strict=True)])
    return {
        "seconds a step": middle(seconds),
        "tokens/s": middle([t / s for t, s in zip(tokens, seconds, strict=True)]),
        "examples/s": middle([e / s for e, s in zip(examples, seconds, strict=True)]),
        "real tokens, %": 100 * source.fill,
        "useful GFLOP/s": middle([f.useful / s for f, s in zip(flops, seconds, strict=True)]) / 1e9,
        "executed GFLOP/s": speed / 1e9,
        "matmul peak, GFLOP/s": peak / 1e9,
        "executed / peak, %": 100 * speed / peak,
        "loss before": loss,
        "weights, GB": sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.base)) / 1e9,
        "peak memory, GB": peak_memory_bytes() / 1e9,
        "load, s": load_seconds,
        "compile, s": compile_seconds,
    }


def _source(config: TrainBench, loaded: Any) -> DataSource:
    """Batches of the data asked for."""
    if config.data == "dense":
        generator = np.random.default_rng(0)
        shape = (config.batch_size * (config.steps + 1), config.sequence_length)
        tokens = generator.integers(0, loaded.config.vocab_size, shape).astype(np.int32)
        all_of_it = np.ones(config.sequence_length, bool)
        return DataSource(
            [TokenizedExample(t, all_of_it, 1, "dense") for t in tokens], config.batch_size, config.sequence_length
        )
    listops = config.data == "listops"
    examples = generate_listops(ListOps(), "train") if listops else read_jsonl(config.data, config.keys)
    encoded, _ = encode(examples, loaded.require_tokenizer(), max_length=config.sequence_length, on_long="drop")
    return DataSource(encoded, config.batch_size, config.sequence_length)


def _device(batch: Batch) -> Batch:
    return jax.tree.map(jnp.asarray, batch)
