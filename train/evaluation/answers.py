"""Questions as tokens, answers with their scores, and the files that keep them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxsteer.inference.events import Answer
from jaxsteer.inference.likelihood import Likelihood
from jaxsteer.io import Tokenizer
from jaxsteer.io.files import parse_json, replacing
from train.data import Encoding, Example, TokenizedExample, Turn, encode, encode_prompts, stop_tokens
from train.tasks import AnswerFormat
from train.tasks.scoring import Accuracy, Rule, accuracy, extract, score

By = Literal["generation", "likelihood"]
"""How an answer is found: the model generates it, or the most likely of the example's choices is taken."""

Normalise = Literal["none", "tokens", "characters"]
"""What the log-likelihood of a choice is divided by: nothing, its number of tokens, or its number of characters."""

LOW_MARGIN = 1e-4
"""Below this difference between the two largest logits, rounding decides: another batch may give another answer."""


@dataclass(frozen=True)
class ScoredAnswer:
    """One answer and its score.

    truncated  the token limit was reached before the answer ended
    margin     smallest lead of a generated token over the runner-up, in logits; None for a choice
    scores     log-likelihood of each choice, normalised as asked; None for a generated answer
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
    def low_margin(self) -> bool:
        """Whether rounding may have decided."""
        return self.margin is not None and self.margin < LOW_MARGIN


@dataclass(frozen=True)
class Prompts:
    """Tokenised prompts with what scoring needs; `choices` and their tokens are empty for generated answers."""

    texts: tuple[str, ...]
    tokens: tuple[TokenizedExample, ...]
    stop: tuple[int, ...]
    rule: Rule
    max_new_tokens: int
    choices: tuple[tuple[str, ...], ...] = ()
    choice_ids: tuple[tuple[np.ndarray, ...], ...] = ()


def make_prompts(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    encoding: Encoding,
    stop: Sequence[int],
    task: AnswerFormat,
    *,
    choices: bool = False,
) -> Prompts:
    """Tokenise the prompts of examples exactly as training does.

    Args:
        examples: with their gold answers.
        tokenizer: of the model.
        encoding: that of the training.
        stop: the model's own stop tokens; those of the tokenizer and the chat template are added.
        task: gives `rule` and `max_new_tokens`.
        choices: also tokenise each example's choices.

    Raises:
        ValueError: an example without choices where they are needed, or whose gold answer is not one of them.
    """
    tokens, _ = encode_prompts(examples, tokenizer, encoding)
    ends = tuple(sorted({*stop, *stop_tokens(tokenizer, encoding)}))
    texts = tuple(tokenizer.decode(example.ids) for example in tokens)
    prompts = Prompts(texts, tuple(tokens), ends, task.rule, task.max_new_tokens)
    return _with_choices(prompts, examples, tokenizer, encoding) if choices else prompts


def _with_choices(prompts: Prompts, examples: Sequence[Example], tokenizer: Tokenizer, encoding: Encoding) -> Prompts:
    """Tokenise each choice as the completion that training would see, end of sequence or turn included."""
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
    encoded, _ = encode(completed, tokenizer, encoding)
    rest = iter(encoded)
    ids = tuple(
        tuple(next(rest).ids[len(prompt) :] for _ in example.choices)
        for prompt, example in zip(prompts.tokens, examples, strict=True)
    )
    return replace(prompts, choices=tuple(example.choices for example in examples), choice_ids=ids)


def generated_reader(prompts: Prompts, tokenizer: Tokenizer) -> Callable[[int, Answer], ScoredAnswer]:
    """(prompt's index, generated tokens) -> the scored answer."""

    def read(index: int, answer: Answer) -> ScoredAnswer:
        output = tokenizer.decode(answer.tokens, skip_special_tokens=True)
        return _scored(prompts, index, output, truncated=not answer.stopped, margin=answer.margin)

    return read


def chosen_reader(prompts: Prompts, normalise: Normalise) -> Callable[[int, list[Likelihood]], ScoredAnswer]:
    """(prompt's index, likelihood of each choice) -> the most likely choice, scored.

    Raises:
        ValueError: an empty choice, which has no characters to divide by.
    """
    for prompt, choices in zip(prompts.tokens, prompts.choices, strict=True):
        if normalise == "characters" and not all(choices):
            raise ValueError(
                f"{prompt.source}: an empty choice has no characters to divide by; use --normalise tokens or none"
            )

    def read(index: int, likelihoods: list[Likelihood]) -> ScoredAnswer:
        choices = prompts.choices[index]
        divisors = {
            "none": [1] * len(choices),
            "tokens": [each.tokens for each in likelihoods],
            "characters": [len(choice) for choice in choices],
        }[normalise]
        scores = tuple(each.log_probability / by for each, by in zip(likelihoods, divisors, strict=True))
        return _scored(prompts, index, choices[int(np.argmax(scores))], scores=scores)

    return read


def _scored(prompts: Prompts, index: int, output: str, *, truncated: bool = False, **details: Any) -> ScoredAnswer:
    prompt, rule = prompts.tokens[index], prompts.rule
    correct = prompt.answer is not None and score(output, prompt.answer, rule)
    read = extract(output, rule)
    return ScoredAnswer(prompts.texts[index], output, read, prompt.answer, correct, truncated, prompt.source, **details)


def accuracy_of(answers: Sequence[ScoredAnswer]) -> Accuracy:
    """Share of correct answers, with its interval."""
    return accuracy(answer.correct for answer in answers)


def summarise(answers: Sequence[ScoredAnswer]) -> dict[str, Any]:
    """Figures of an evaluation, JSON values."""
    result = accuracy_of(answers)
    return {
        "accuracy": result.rate,
        "interval": list(result.interval),
        "truncated": sum(answer.truncated for answer in answers),
        "low_margin": sum(answer.low_margin for answer in answers),
    }


def write_answers(path: Path, answers: Sequence[ScoredAnswer]) -> None:
    """Write one JSON line per answer; the file is replaced as a whole."""
    lines = "".join(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers)
    with replacing(path) as file:
        file.write(lines.encode())


def read_answers(path: Path) -> list[ScoredAnswer]:
    """Read what `write_answers` wrote."""
    lines = enumerate(path.read_text(encoding="utf-8").split("\n"), 1)
    return [answer_from_json(parse_json(line, f"{path}:{number}")) for number, line in lines if line]


def answer_from_json(data: dict[str, Any]) -> ScoredAnswer:
    """An answer from its JSON object."""
    answer = ScoredAnswer(**data)
    return answer if answer.scores is None else replace(answer, scores=tuple(answer.scores))
