"""The evaluation benchmark: answers of all prompts in rows that are kept full, against one prompt at a time."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxsteer.inference.continuous import Answer, generate_all
from jaxsteer.models.transformer import Model
from jaxsteer.plans import parse_plan
from jaxsteer.steering import init_steering
from train.base_models import load
from train.data import Example, TokenizedExample, encode_prompts, stop_tokens
from train.evaluation.answers import NEAR_TIE


@dataclass(frozen=True)
class EvalBench:
    """Examples a second of evaluation by generation: batched against one at a time, in turns."""

    model: str = "smollm2-135m-instruct"
    """A local folder or .gguf file, a Hugging Face id, or smollm2-135m-instruct."""
    plan: tuple[str, ...] = ("nonlinear(rank=8) @ block",)
    """What is steered where."""
    data: str | None = None
    """A JSONL file whose prompts are answered; by default random tokens of the lengths of GSM8K's questions."""
    prompt: str = "question"
    """The field of a line that has the prompt."""
    examples: int = 192
    """Prompts answered in rows."""
    alone: int = 8
    """Of these, prompts that are also answered one at a time, spread over the lengths."""
    batch_size: int = 96
    """Prompts decoded at a time."""
    new_tokens: int = 100
    """The most tokens of an answer."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the weights and the compute."""
    json: str | None = None
    """Write the figures to this file."""


def bench_eval(config: EvalBench) -> dict[str, float]:
    """Run the evaluation benchmark and return its figures.

    The prompts one at a time are cut into parts, and the batched run stands between them, so that a machine that is
    busy for a while slows both.
    """
    loaded = load(config.model, config.dtype)
    plan = parse_plan(config.plan, loaded.config)
    model = Model(loaded.config, plan)
    steering = init_steering(plan, loaded.config, jax.random.key(0), base=loaded.base)
    prompts = _prompts(config, loaded.require_tokenizer())
    stops = tuple(sorted({*loaded.stop_tokens, *stop_tokens(loaded.require_tokenizer())}))

    def answer(some: Sequence[TokenizedExample], rows: int, cut_short: bool = False) -> tuple[list[Answer], float]:
        began = time.perf_counter()
        found = dict(
            generate_all(
                model,
                loaded.base,
                steering,
                some,
                max_new_tokens=config.new_tokens,
                stop_tokens=stops,
                rows=rows,
                ended=lambda index, tokens: cut_short,
            )
        )
        return [found[i] for i in range(len(some))], time.perf_counter() - began

    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    count = min(config.alone, len(prompts))
    chosen = [by_length[int((i + 0.5) * len(prompts) / count)] for i in range(count)]
    # The first runs compile.
    answer(prompts, config.batch_size, cut_short=True)
    for i in chosen:
        answer([prompts[i]], 1, cut_short=True)
    first = [answer([prompts[i]], 1) for i in chosen]
    batched, seconds = answer(prompts, config.batch_size)
    second = [answer([prompts[i]], 1) for i in chosen]
    alone = [statistics.mean((a[1], b[1])) for a, b in zip(first, second, strict=True)]
    pairs = [(batched[i], each[0][0]) for i, each in zip(chosen, first, strict=True)]
    clear = [(a, b) for a, b in pairs if min(a.margin, b.margin) > NEAR_TIE]
    rate, rate_alone = len(prompts) / seconds, len(alone) / sum(alone)
    return {
        "prompt tokens, mean": statistics.mean(map(len, prompts)),
        "answer tokens, mean": statistics.mean(len(each.tokens) for each in batched),
        "one at a time, examples/s": rate_alone,
        "batched, examples/s": rate,
        "batched / one at a time": rate / rate_alone,
        "answers compared": len(pairs),
        "near ties among them": len(pairs) - len(clear),
        "others that differ": sum(not np.array_equal(a.tokens, b.tokens) for a, b in clear),
    }


def _prompts(config: EvalBench, tokenizer: Any) -> list[TokenizedExample]:
    if config.data is not None:
        lines = Path(config.data).read_text(encoding="utf-8").splitlines()[: config.examples]
        rows = [json.loads(line) for line in lines if line.strip()]
        if missing := [i for i, row in enumerate(rows, 1) if config.prompt not in row]:
            raise ValueError(f"{config.data}:{missing[0]}: no field {config.prompt!r}; --prompt names the field")
        texts = [Example.of(f"{row[config.prompt]}\n", None, f"{config.data}:{i}") for i, row in enumerate(rows, 1)]
        return encode_prompts(texts, tokenizer)[0]
    draw = np.random.default_rng(0)
    # As GSM8K's questions in SmolLM2's tokens: half between 43 and 74, hardly any above 150.
    lengths = np.clip(draw.lognormal(np.log(57), 0.4, config.examples), 16, 192).astype(int)
    plain = [i for i in range(len(tokenizer)) if i not in set(tokenizer.all_special_ids)]
    return [
        TokenizedExample(draw.choice(plain, n).astype(np.int32), np.zeros(n, bool), int(n), f"random {i}")
        for i, n in enumerate(lengths)
    ]
