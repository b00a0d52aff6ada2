"""The evaluation benchmark: answers from continuous batching against answers decoded one prompt at a time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import jax
import numpy as np

from jaxsteer.inference import Answer, Decoder, Limits, Request, generate_all
from jaxsteer.io import LoadedModel
from jaxsteer.io.load import require_tokenizer
from jaxsteer.io.tokenizer import Tokenizer
from jaxsteer.models.transformer import Model, Network
from jaxsteer.plans import parse_plan
from jaxsteer.ranges import Count, check_ranges
from jaxsteer.steering import init_steering
from train.base_models import check_plan, load, resolve_model
from train.data import Example, TokenizedExample, encode_prompts, stop_tokens
from train.data.fields import as_text, located
from train.data.text_files import json_lines
from train.evaluation.answers import LOW_MARGIN


@dataclass(frozen=True)
class EvalBench:
    """Measure the examples per second of evaluation by generation: batched, against one prompt at a time."""

    model: str = "smollm2-135m-instruct"
    """Local folder, .gguf file or Hugging Face id of the base model, or smollm2-135m-instruct."""
    plan: tuple[str, ...] = ("nonlinear(rank=8) @ block",)
    """Steering plan: what is steered at which sites."""
    data: str | None = None
    """A JSONL file with prompts; by default random tokens, as long as GSM8K's questions."""
    prompt: str = "question"
    """Field of the JSONL file that holds the prompt."""
    examples: Count = 192
    """Maximum number of prompts answered in batches."""
    alone: Count = 8
    """Number of these prompts, of evenly spread lengths, that are also answered one at a time."""
    batch_size: Count = 96
    """Number of prompts decoded at a time."""
    new_tokens: Count = 100
    """Maximum number of tokens in an answer."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the weights and the compute; auto: float32 on CPU, bfloat16 on accelerators."""
    json: str | None = None
    """Write the figures to this file."""

    def __post_init__(self) -> None:
        """Reject settings that nothing can be measured with."""
        check_ranges(self)


class _Run:
    """A model that answers prompts, and the time that this takes."""

    def __init__(self, config: EvalBench, loaded: LoadedModel) -> None:
        plan = parse_plan(config.plan, loaded.config)
        steering = init_steering(plan, loaded.config, jax.random.key(0), base=loaded.base)
        self._network = Network(Model(loaded.config, plan), loaded.base, steering)
        self._stops = tuple(sorted({*loaded.stop_tokens, *stop_tokens(loaded.require_tokenizer())}))
        self._new_tokens = config.new_tokens

    def answer(self, prompts: Sequence[TokenizedExample], rows: int) -> tuple[list[Answer], float]:
        """Answers in the order of the prompts, and seconds."""
        began = time.perf_counter()
        answers = self._answer(prompts, rows, cut_short=False)
        return answers, time.perf_counter() - began

    def compile(self, prompts: Sequence[TokenizedExample], rows: int) -> None:
        """Compile what `answer` needs: every answer ends after its first chunk."""
        self._answer(prompts, rows, cut_short=True)

    def _answer(self, prompts: Sequence[TokenizedExample], rows: int, *, cut_short: bool) -> list[Answer]:
        network = self._network
        limits = Limits(max(map(len, prompts)), self._new_tokens, rows)
        decoder = Decoder(network.model, network.base, network.steering, limits)
        requests = [Request(prompt, self._new_tokens, self._stops) for prompt in prompts]
        answers = dict(generate_all(decoder, requests, lambda index, tokens: cut_short))
        return [answers[i] for i in range(len(prompts))]


def bench_eval(config: EvalBench) -> dict[str, float]:
    """Run the evaluation benchmark and return its figures.

    The prompts are answered one at a time before and after the batched run, so that a machine that is busy for a while
    slows both.
    """
    require_tokenizer(resolve_model(config.model))
    check_plan(config.model, config.plan)
    loaded = load(config.model, config.dtype)
    prompts = questions(config.data, config.prompt, config.examples, loaded.require_tokenizer())
    run = _Run(config, loaded)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    count = min(config.alone, len(prompts))
    chosen = [by_length[int((i + 0.5) * len(prompts) / count)] for i in range(count)]
    run.compile(prompts, config.batch_size)
    for i in chosen:
        run.compile([prompts[i]], 1)
    before = [run.answer([prompts[i]], 1) for i in chosen]
    batched, seconds = run.answer(prompts, config.batch_size)
    after = [run.answer([prompts[i]], 1) for i in chosen]
    seconds_alone = sum(statistics.mean((a, b)) for (_, a), (_, b) in zip(before, after, strict=True))
    pairs = [(batched[i], answers[0]) for i, (answers, _) in zip(chosen, before, strict=True)]
    clear = [(a, b) for a, b in pairs if min(a.margin, b.margin) > LOW_MARGIN]
    rate, rate_alone = len(prompts) / seconds, count / seconds_alone
    return {
        "prompt tokens, mean": statistics.mean(map(len, prompts)),
        "answer tokens, mean": statistics.mean(len(answer.tokens) for answer in batched),
        "one at a time, examples/s": rate_alone,
        "batched, examples/s": rate,
        "batched / one at a time": rate / rate_alone,
        "answers compared": len(pairs),
        "of these, with a low margin": len(pairs) - len(clear),
        "other answers that differ": sum(not np.array_equal(a.tokens, b.tokens) for a, b in clear),
    }


def questions(data: str | None, field: str, count: int, tokenizer: Tokenizer) -> list[TokenizedExample]:
    """Prompts to answer.

    Args:
        data: JSONL file; None for random tokens, as long as GSM8K's questions.
        field: of the file that holds the prompt.
        count: maximum number of prompts.
        tokenizer: of the model.

    Raises:
        ValueError: a row of the file has no such field.
    """
    if data is not None:
        rows = dict(islice(json_lines(data), count))
        if missing := [source for source, row in rows.items() if field not in row]:
            raise ValueError(f"{missing[0]}: no field {field!r}; --prompt names the field")
        texts = []
        for source, row in rows.items():
            with located(source):
                texts.append(Example.of(f"{as_text(row[field], field)}\n", None, source))
        return encode_prompts(texts, tokenizer)[0]
    draw = np.random.default_rng(0)
    # Like GSM8K's questions in SmolLM2's tokens: half between 43 and 74, hardly any above 150.
    lengths = np.clip(draw.lognormal(np.log(57), 0.4, count), 16, 192).astype(int)
    special = set(tokenizer.all_special_ids)
    plain = [i for i in range(tokenizer.backend_tokenizer.get_vocab_size()) if i not in special]
    return [
        TokenizedExample(draw.choice(plain, n).astype(np.int32), np.zeros(n, bool), int(n), f"random {i}")
        for i, n in enumerate(lengths)
    ]
