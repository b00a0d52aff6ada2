"""Benchmarks: `python -m train.bench train --rows 8 --length 256`, `... decode`, `... eval`, `... load`.

Each prints a table and, with --json, writes the figures. Compare two settings by interleaved runs on a quiet machine.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from jaxsteer.flops import step_flops
from jaxsteer.generate import generate
from jaxsteer.io.files import write_json
from jaxsteer.models.attention import causal_share
from jaxsteer.models.transformer import Model, Remat
from jaxsteer.objective import next_tokens, supervised_loss
from jaxsteer.optim import Params, split
from jaxsteer.plan_text import parse_plan
from jaxsteer.steering import init_steering
from jaxsteer.training import init_state
from jaxsteer.types import Batch, Steering
from train.base_models import load
from train.bench_eval import EvalBench, bench_eval
from train.bench_load import LoadBench, bench_load
from train.cli import run_main
from train.config import TrainConfig
from train.data import DataSource, Keys, ListOps, TokenizedExample, encode, read_jsonl, stack_rows
from train.data.listops import generate as generate_listops
from train.devices.machine import (
    device_summary,
    enable_compilation_cache,
    matmul_peak_flops,
    peak_memory_bytes,
)
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
    rows: int = 8
    """Rows of a batch."""
    length: int = 256
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


@dataclass(frozen=True)
class DecodeBench:
    """What steering costs when serving: latency of a token and memory, steered against the base model."""

    model: str = "smollm2-135m-instruct"
    """A local folder or .gguf file, a Hugging Face id, or smollm2-135m-instruct."""
    plan: tuple[str, ...] = ("nonlinear(rank=8) @ block",)
    """What is steered where."""
    rows: int = 1
    """Prompts decoded at a time."""
    prompt: int = 32
    """Tokens of a prompt."""
    new_tokens: int = 64
    """Tokens to decode."""
    repeats: int = 7
    """Interleaved pairs of runs; medians count."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the weights and the compute."""
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
        rows=config.rows,
        row_length=config.length,
        mesh=SINGLE,
    )
    program = make_program(settings, loaded.config, loaded.base, steps=1000)
    model, tx = program.model, program.tx
    params = Params(loaded.base, init_steering(model.plan, loaded.config, jax.random.key(0), base=loaded.base))
    trained, frozen = split(params, program.labels)
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
        supervised = int((np.asarray(next_tokens(batch).weights) > 0).sum())
        share = causal_share(config.length, program.attention[0])
        flops.append(step_flops(model, config.rows, config.length, supervised, causal_share=share))
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


def bench_decode(config: DecodeBench) -> dict[str, float]:
    """Run the decoding benchmark and return its figures."""
    loaded = load(config.model, config.dtype)
    plan = parse_plan(config.plan, loaded.config)
    # Not the fresh initialisation, whose zeros a compiler could not know but a cache might like.
    steering = jax.tree.map(lambda x: x + 0.01, init_steering(plan, loaded.config, jax.random.key(0), base=loaded.base))
    tokens = np.random.default_rng(0).integers(0, loaded.config.vocab_size, (config.rows, config.prompt))
    row = [
        [TokenizedExample(t.astype(np.int32), np.zeros(config.prompt, np.float32), config.prompt, "")] for t in tokens
    ]
    prompts = _device(stack_rows(row, config.prompt))

    def seconds(model: Model, params: Steering, new_tokens: int) -> float:
        began = time.perf_counter()
        run = generate(model, loaded.base, params, prompts, max_new_tokens=new_tokens, stop_tokens=(-1,))
        jax.block_until_ready(run)
        return time.perf_counter() - began

    variants = {"base": (Model(loaded.config), {}), "steered": (Model(loaded.config, plan), steering)}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(config.repeats + 1):
        for name, (model, params) in variants.items():
            # The difference of two lengths leaves the prefill out.
            whole, short = seconds(model, params, config.new_tokens + 1), seconds(model, params, 1)
            if repeat:  # the first compiles
                times[name].append((whole - short) / config.new_tokens)
    memory: dict[str, Any] = {
        name: generate.lower(
            model, loaded.base, params, prompts, max_new_tokens=config.new_tokens + 1, stop_tokens=(-1,)
        )
        .compile()
        .memory_analysis()
        for name, (model, params) in variants.items()
    }
    used = {name: m.argument_size_in_bytes + m.temp_size_in_bytes for name, m in memory.items()}
    base, steered = (statistics.median(times[name]) for name in variants)
    ratios = [s / b for b, s in zip(times["base"], times["steered"], strict=True)]
    return {
        "base, ms a token": 1e3 * base,
        "steered, ms a token": 1e3 * steered,
        "steered / base, latency": statistics.median(ratios),
        "base, GB": used["base"] / 1e9,
        "steered, GB": used["steered"] / 1e9,
        "steered / base, memory": used["steered"] / used["base"],
    }


def _source(config: TrainBench, loaded: Any) -> DataSource:
    """Batches of the data asked for."""
    if config.data == "dense":
        generator = np.random.default_rng(0)
        shape = (config.rows * (config.steps + 1), config.length)
        tokens = generator.integers(0, loaded.config.vocab_size, shape).astype(np.int32)
        weights = np.ones(config.length, np.float32)
        return DataSource([TokenizedExample(t, weights, 1, "dense") for t in tokens], config.rows, config.length)
    listops = config.data == "listops"
    examples = generate_listops(ListOps(), "train") if listops else read_jsonl(config.data, config.keys)
    encoded, _ = encode(examples, loaded.tokenizer, max_length=config.length, on_long="drop")
    return DataSource(encoded, config.rows, config.length)


def _device(batch: Batch) -> Batch:
    return jax.tree.map(jnp.asarray, batch)


Bench = (
    Annotated[TrainBench, tyro.conf.subcommand("train")]
    | Annotated[DecodeBench, tyro.conf.subcommand("decode")]
    | Annotated[EvalBench, tyro.conf.subcommand("eval")]
    | Annotated[LoadBench, tyro.conf.subcommand("load")]
)


def main() -> None:
    """Run a benchmark and print its figures."""
    config = tyro.cli(Bench, prog="python -m train.bench", description=__doc__)
    enable_compilation_cache()
    figures: dict[str, Any]
    if isinstance(config, LoadBench):
        figures = bench_load(config)
        table = Table("", *figures)
        for name in next(iter(figures.values())):
            table.add_row(name, *(_text(each[name]) for each in figures.values()))
    else:
        runs = {TrainBench: bench_train, DecodeBench: bench_decode, EvalBench: bench_eval}
        figures = runs[type(config)](config)  # type: ignore[operator]
        table = Table(title=device_summary(), title_justify="left", show_header=False)
        for name, value in figures.items():
            table.add_row(name, _text(value))
    Console().print(table)
    if config.json:
        write_json(config.json, {"device": device_summary(), "settings": repr(config), **figures})


def _text(value: float) -> str:
    return f"{value:,.4g}" if value < 100 else f"{value:,.0f}"


if __name__ == "__main__":
    run_main(main)
