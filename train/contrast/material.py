"""All that is read and tokenised before the model's weights are loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxsteer.io import LoadedModel, Tokenizer
from jaxsteer.models.config import check_length
from train.contrast.answers import Answering, Asked, Scorer
from train.contrast.pairs import Pair, Sides, divide, encode_pairs, read_pairs
from train.contrast.settings import ContrastConfig
from train.data import Encoding, Example, TokenizedExample, encode_prompts, stop_tokens
from train.data.preference_rows import PreferenceReading
from train.data.prompts import Asking, check_unicode, read_questions
from train.display.console import say
from train.evaluation.neutral import neutral_examples, read_neutral
from train.tasks.rewards import imported


@dataclass(frozen=True)
class Material:
    """All that is read before the model's weights are.

    pairs, validation    the pairs that a vector is made of, and those that decide, as tokens
    neutral              the neutral texts
    answering            prompts, and how they are answered
    texts                name and tokens of each text whose projections are shown
    encoding             how texts became tokens
    digests              of the files, by their settings
    """

    pairs: Sides
    validation: Sides
    neutral: list[TokenizedExample]
    answering: Answering
    texts: list[tuple[str, TokenizedExample]]
    encoding: Encoding
    digests: dict[str, str]


def read_material(config: ContrastConfig, described: LoadedModel) -> Material:
    """Read and tokenise everything; `described` has the tokenizer and the sizes of the model.

    Raises:
        ValueError: a file that cannot be used, naming file and line.
    """
    tokenizer = described.require_tokenizer()
    encoding = Encoding(chat=config.chat).dated(tokenizer)
    reading = PreferenceReading(template=config.template, chat=config.chat)
    pairs, deciding = _pairs(config, reading)
    train, validation = (encode_pairs(some, tokenizer, encoding, described.config) for some in (pairs, deciding))
    neutral = neutral_examples(read_neutral(config.neutral), tokenizer)
    asked = _asked(config, deciding, tokenizer, encoding) or _beginnings(neutral, tokenizer)
    texts = _texts(config, validation, tokenizer, encoding)
    for each in asked[: config.answers]:
        check_length(described.config, len(each.tokens) + config.max_new_tokens, each.tokens.source)
    for _, text in texts:
        check_length(described.config, len(text), text.source)
    stop = stop_tokens(tokenizer, encoding)
    scorer = Scorer(config.scorer, imported(config.scorer, "--scorer")) if config.scorer else None
    answering = Answering(asked[: config.answers], tokenizer, stop, config.max_new_tokens, scorer)
    files = {
        "pairs": config.pairs,
        "validation": config.validation,
        "prompts": config.prompts,
        "neutral": config.neutral,
    }
    digests = {name: hashlib.sha256(Path(file).read_bytes()).hexdigest() for name, file in files.items() if file}
    return Material(train, validation, neutral, answering, texts, encoding, digests)


def _pairs(config: ContrastConfig, reading: PreferenceReading) -> tuple[list[Pair], list[Pair]]:
    """The pairs that a vector is made of, and those that decide; says where they are not apart."""
    pairs = read_pairs(config.pairs, reading)
    if config.validation is not None:
        deciding = read_pairs(config.validation, reading)
        known = {pair.turns for pair in pairs}
        if common := sum(pair.turns in known for pair in deciding):
            say(f"note: {config.validation}: {common} of {len(deciding)} pairs are in {config.pairs} too")
        return pairs, deciding
    if len(pairs) < 4:
        say(f"note: {config.pairs}: {len(pairs)} pairs are too few to hold any out; they decide themselves")
    parts = divide(len(pairs), config.validation_share, config.seed)
    made, held = ([pairs[i] for i in part.tolist()] for part in parts)
    return made, held


def _asked(config: ContrastConfig, pairs: Sequence[Pair], tokenizer: Tokenizer, encoding: Encoding) -> list[Asked]:
    """The prompts to answer: of a file, or of the pairs; [] if these have none.

    Raises:
        ValueError: a scorer without prompts, or only one prompt.
    """
    if config.prompts is not None:
        questions = read_questions(config.prompts, Asking(config.template), "lines")
        examples = [question.example for question in questions]
    else:
        found = {question.turns: question for pair in pairs if (question := pair.question) is not None}
        examples = list(found.values())
    if len(examples) < 2 and (config.prompts is not None or config.scorer is not None):
        where = config.prompts or "the validation pairs"
        raise ValueError(f"{where}: {len(examples)} prompts to answer, need at least 2; give more with --prompts")
    if len(examples) < 2:
        return []
    examples = examples[: config.answers]
    tokens, _ = encode_prompts(examples, tokenizer, encoding)
    return [Asked(example.turns[-1].text, prompt) for example, prompt in zip(examples, tokens, strict=True)]


def _beginnings(neutral: Sequence[TokenizedExample], tokenizer: Tokenizer) -> list[Asked]:
    """The first halves of neutral texts."""
    halves = [(text.ids[: text.prompt_length], text.source) for text in neutral]
    return [
        Asked(tokenizer.decode(ids), TokenizedExample(ids, np.zeros(len(ids), bool), len(ids), source))
        for ids, source in halves
    ]


def _texts(
    config: ContrastConfig, validation: Sides, tokenizer: Tokenizer, encoding: Encoding
) -> list[tuple[str, TokenizedExample]]:
    """The texts whose projections are shown."""
    if not config.text:
        return [("positive", validation.positive[0]), ("negative", validation.negative[0])]
    for text in config.text:
        check_unicode(text, "--text")
    examples = [Example.of(config.template.replace("{prompt}", text), None, "--text") for text in config.text]
    tokens, _ = encode_prompts(examples, tokenizer, encoding)
    return [(f"text {number}", each) for number, each in enumerate(tokens, 1)]
