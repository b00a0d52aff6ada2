"""Evaluation by decoding: prompts in, answers scored, with every output kept for reading."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.generate import Generated, Sampling, generate
from jaxsteer.models.transformer import Model
from jaxsteer.types import Batch, PyTree, Steering
from train.data import Example, TokenizedExample, encode_prompts, prompt_batches, stop_tokens
from train.distributed import fetch
from train.scoring import Accuracy, Rule, accuracy, extract, score


@dataclass(frozen=True)
class Decoded:
    """One answer. `truncated`: it used all its tokens without ending."""

    prompt: str
    output: str
    extracted: str | None
    gold: str | None
    correct: bool
    truncated: bool
    source: str


@dataclass(frozen=True)
class Prompts:
    """Prompts ready to decode, with what scoring needs."""

    texts: tuple[str, ...]
    tokens: tuple[TokenizedExample, ...]
    stop: tuple[int, ...]
    rule: Rule
    max_new_tokens: int


def make_prompts(examples: Sequence[Example], tokenizer: Any, stop: Sequence[int], task: Any) -> Prompts:
    """Tokenise the prompts of examples as training does.

    Args:
        examples: with their gold answers. tokenizer: of the model. stop: the model's own stop tokens.
        task: gives chat, rule and max_new_tokens.
    """
    tokens, _ = encode_prompts(examples, tokenizer, chat=task.chat)
    ends = tuple(sorted({*stop, *stop_tokens(tokenizer, chat=task.chat)}))
    texts = tuple(tokenizer.decode(t.ids) for t in tokens)
    return Prompts(texts, tuple(tokens), ends, task.rule, task.max_new_tokens)


def decode(
    model: Model,
    base: PyTree,
    steering: Steering,
    prompts: Prompts,
    tokenizer: Any,
    *,
    rows: int = 64,
    sampling: Sampling | None = None,
    key: jax.Array | None = None,
    advance: Callable[[int], None] = lambda done: None,
    place: Callable[[Batch], Batch] = lambda batch: jax.tree.map(jnp.asarray, batch),
) -> list[Decoded]:
    """Answer every prompt, batched by length, and score it.

    Results come in the order of the prompts; with several processes each has all of them.

    Args:
        model, base, steering: that answer.
        prompts, tokenizer: what to answer.
        rows: decoded at a time.
        sampling: greedy by default. key: for sampling.
        advance: hears how many are done.
        place: puts a batch on the devices that the weights lie on.
    """
    results: dict[int, Decoded] = {}
    rows = min(rows, len(prompts.tokens))
    for number, (batch, indices) in enumerate(prompt_batches(prompts.tokens, rows)):
        own = None if key is None else jax.random.fold_in(key, number)
        out: Generated = fetch(
            generate(
                model,
                base,
                steering,
                place(batch),
                own,
                max_new_tokens=prompts.max_new_tokens,
                stop_tokens=prompts.stop,
                sampling=sampling or Sampling(),
            )
        )
        for row, index in enumerate(indices):
            if index >= 0:
                prompt = prompts.tokens[index]
                output = tokenizer.decode(np.asarray(out.tokens[row, : out.lengths[row]]), skip_special_tokens=True)
                gold = prompt.answer
                results[index] = Decoded(
                    prompts.texts[index],
                    output,
                    extract(output, prompts.rule),
                    gold,
                    gold is not None and score(output, gold, prompts.rule),
                    not bool(out.stopped[row]),
                    prompt.source,
                )
        advance(len(results))
    return [results[i] for i in range(len(prompts.tokens))]


def accuracy_of(decoded: Sequence[Decoded]) -> Accuracy:
    """Share of right answers, with its interval."""
    return accuracy(d.correct for d in decoded)


def write_answers(path: Path, decoded: Sequence[Decoded]) -> None:
    """One answer a line, JSON; whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(asdict(d), ensure_ascii=False) + "\n" for d in decoded), encoding="utf-8")
    part.replace(path)


def read_answers(path: Path) -> list[Decoded]:
    """Read what `write_answers` wrote."""
    return [Decoded(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
