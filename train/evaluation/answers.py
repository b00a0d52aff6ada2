"""Evaluation: prompts in, answers decoded or chosen, scored, with every one kept for reading."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.inference.decoder import Answer, Decoder, Limits, Request, generate_all
from jaxsteer.inference.generate import Sampling
from jaxsteer.inference.likelihood import Likelihood, score_continuations
from jaxsteer.models.transformer import Model
from jaxsteer.types import Batch, PyTree, Steering
from train.data import Example, TokenizedExample, Turn, encode, encode_prompts, stop_tokens
from train.tasks.scoring import Accuracy, Rule, accuracy, extract, score

Normalise = Literal["none", "tokens", "characters"]
"""What the log-likelihood of a choice is divided by: nothing, its number of tokens, or of characters."""

NEAR_TIE = 1e-4
"""Where the two largest logits differ by less, rounding decides: another batch may give another answer."""


@dataclass(frozen=True)
class Decoded:
    """One answer. `truncated`: it used all its tokens without ending.

    margin  smallest lead of the token chosen over the next best, in logits; None for a choice
    scores  of a choice: each candidate's log-likelihood, normalised as asked
    """

    prompt: str
    output: str
    extracted: str | None
    gold: str | None
    correct: bool
    truncated: bool
    source: str
    margin: float | None = None
    scores: tuple[float, ...] | None = None

    @property
    def near_tie(self) -> bool:
        """Whether rounding may have decided."""
        return self.margin is not None and self.margin < NEAR_TIE


@dataclass(frozen=True)
class Prompts:
    """Prompts ready to be answered, with what scoring needs; `choices` are those of the examples."""

    texts: tuple[str, ...]
    tokens: tuple[TokenizedExample, ...]
    stop: tuple[int, ...]
    rule: Rule
    max_new_tokens: int
    choices: tuple[tuple[str, ...], ...] = ()
    choice_ids: tuple[tuple[np.ndarray, ...], ...] = ()


def make_prompts(
    examples: Sequence[Example], tokenizer: Any, stop: Sequence[int], task: Any, *, choices: bool = False
) -> Prompts:
    """Tokenise the prompts of examples as training does.

    Args:
        examples: with their gold answers. tokenizer: of the model. stop: the model's own stop tokens.
        task: gives chat, rule and max_new_tokens.
        choices: tokenise the examples' choices too.

    Raises:
        ValueError: an example without choices where they are asked for, or whose gold answer is not one of them.
    """
    tokens, _ = encode_prompts(examples, tokenizer, chat=task.chat)
    ends = tuple(sorted({*stop, *stop_tokens(tokenizer, chat=task.chat)}))
    texts = tuple(tokenizer.decode(t.ids) for t in tokens)
    prompts = Prompts(texts, tuple(tokens), ends, task.rule, task.max_new_tokens)
    return _with_choices(prompts, examples, tokenizer, chat=task.chat) if choices else prompts


def _with_choices(prompts: Prompts, examples: Sequence[Example], tokenizer: Any, *, chat: bool) -> Prompts:
    """Each choice as the completion that training would see: its tokens end with the end of the sequence or turn."""
    completed = []
    for example in examples:
        if len(example.choices) < 2:
            raise ValueError(f"{example.source}: has no choices to score; evaluate by generation")
        if example.gold is not None and not any(score(c, example.gold, prompts.rule) for c in example.choices):
            raise ValueError(f"{example.source}: the answer {example.gold!r} is none of {list(example.choices)}")
        role: Any = "completion" if example.context.turns[-1].role == "prompt" else "assistant"
        completed += [
            replace(example, turns=(*example.context.turns, Turn(role, choice)), answer=None)
            for choice in example.choices
        ]
    encoded, _ = encode(completed, tokenizer, chat=chat)
    rest = iter(encoded)
    ids = tuple(
        tuple(next(rest).ids[len(prompt) :] for _ in example.choices)
        for prompt, example in zip(prompts.tokens, examples, strict=True)
    )
    return replace(prompts, choices=tuple(example.choices for example in examples), choice_ids=ids)


def _on_device(batch: Batch) -> Batch:
    return jax.tree.map(jnp.asarray, batch)


Keep = Callable[[int, Decoded], None]
Done = Mapping[int, Decoded]


def decode(
    model: Model,
    base: PyTree,
    steering: Steering,
    prompts: Prompts,
    tokenizer: Any,
    *,
    batch_size: int = 64,
    sampling: Sampling | None = None,
    key: jax.Array | None = None,
    advance: Callable[[int], None] = lambda done: None,
    place: Callable[[Batch], Batch] = _on_device,
    done: Done | None = None,
    keep: Keep = lambda index, answer: None,
) -> list[Decoded]:
    """Answer every prompt and score it; rows whose answer is finished are taken over by waiting prompts.

    Results come in the order of the prompts; with several processes each has all of them.

    Args:
        model, base, steering: that answer.
        prompts, tokenizer: what to answer.
        batch_size: prompts decoded at a time.
        sampling: greedy by default. key: for sampling.
        advance: hears how many are done.
        place: puts a batch on the devices that the weights lie on.
        done: answers that are known already, by the prompts' numbers.
        keep: hears each new answer.
    """

    def read(index: int, answer: Answer) -> Decoded:
        prompt = prompts.tokens[index]
        output = tokenizer.decode(answer.tokens, skip_special_tokens=True)
        right = prompt.answer is not None and score(output, prompt.answer, prompts.rule)
        return Decoded(
            prompts.texts[index],
            output,
            extract(output, prompts.rule),
            prompt.answer,
            right,
            not answer.stopped,
            prompt.source,
            answer.margin,
        )

    results = dict(done or {})
    left = [i for i in range(len(prompts.tokens)) if i not in results]
    longest = max((len(prompts.tokens[i].ids) for i in left), default=1)
    limits = Limits(longest, prompts.max_new_tokens, rows=batch_size)
    seed = 0 if key is None else int(np.asarray(jax.random.key_data(key))[-1])
    requests = [
        Request(prompts.tokens[i], prompts.max_new_tokens, prompts.stop, sampling or Sampling(), seed << 32 | i)
        for i in left
    ]
    answers = generate_all(Decoder(model, base, steering, limits, place), requests)
    return _collect(results, ((left[i], read(left[i], answer)) for i, answer in answers), advance, keep)


def choose(
    model: Model,
    base: PyTree,
    steering: Steering,
    prompts: Prompts,
    *,
    batch_size: int = 32,
    normalise: Normalise = "none",
    advance: Callable[[int], None] = lambda done: None,
    place: Callable[[Batch], Batch] = _on_device,
    done: Done | None = None,
    keep: Keep = lambda index, answer: None,
) -> list[Decoded]:
    """Answer every prompt with its likeliest choice, and score it.

    Args:
        prompts: with their choices, see `make_prompts`.
        batch_size: prompts at a time.
        normalise: see `Normalise`.
        model, base, steering, advance, place, done, keep: as in `decode`.
    """

    def read(index: int, found: list[Likelihood]) -> Decoded:
        prompt, choices = prompts.tokens[index], prompts.choices[index]
        sizes = {
            "none": [1] * len(choices),
            "tokens": [each.tokens for each in found],
            "characters": [len(choice) for choice in choices],
        }[normalise]
        scores = tuple(each.log_probability / size for each, size in zip(found, sizes, strict=True))
        output = choices[int(np.argmax(scores))]
        right = prompt.answer is not None and score(output, prompt.answer, prompts.rule)
        read = extract(output, prompts.rule)
        return Decoded(prompts.texts[index], output, read, prompt.answer, right, False, prompt.source, scores=scores)

    results = dict(done or {})
    left = [i for i in range(len(prompts.tokens)) if i not in results]
    found = score_continuations(
        model,
        base,
        steering,
        [prompts.tokens[i] for i in left],
        [prompts.choice_ids[i] for i in left],
        batch_size=batch_size,
        place=place,
    )
    return _collect(results, ((left[i], read(left[i], scores)) for i, scores in found), advance, keep)


def _collect(results: dict[int, Decoded], new: Any, advance: Callable[[int], None], keep: Keep) -> list[Decoded]:
    for index, answer in new:
        results[index] = answer
        keep(index, answer)
        advance(len(results))
    return [results[i] for i in range(len(results))]


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
    return [answer_from_json(json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n") if line]


def answer_from_json(data: dict[str, Any]) -> Decoded:
    """An answer from its JSON object."""
    answer = Decoded(**data)
    return answer if answer.scores is None else replace(answer, scores=tuple(answer.scores))
