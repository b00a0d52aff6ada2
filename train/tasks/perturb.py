"""The same questions asked otherwise: misspelt, in other letters, in other words, with their choices in another order.

How an example changes is a function of (what it asks, kind, seed): not of its place, its file, or its neighbours.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, TypeVar, get_args

from train.data import Example
from train.data.examples import Turn
from train.tasks import HubTask, ListOpsTask, Split, Task
from train.tasks.hub import Asked, keep
from train.tasks.record import Option, Question, holes

Kind = Literal["typos", "casing", "paraphrase", "choices"]
"""typos       one word in seven (at least one) of four letters or more is misspelt
casing      all letters large, or all small
paraphrase  another wording around the question
choices     the listed candidates in another order; gold and completion follow
"""

TYPO_SHARE = 1 / 7
"""Of the words that can be misspelt."""

# Parts of a prompt that say how to answer, or that are no prose.
_FORMAT = {"options", "lead", "after", "given", "expression"}
_WORD = re.compile(r"[^\W\d_]{4,}")

Draw = Callable[[], float]
T = TypeVar("T")


def perturbed(task: Task, split: Split, kind: Kind, seed: int = 0) -> list[Example]:
    """The examples of a split, each changed; same order and sources as `task.load(split)`, same gold but for "choices".

    Completions and candidates keep their spelling: they are what the model should say.

    Raises:
        ValueError: an unknown kind, or one that the task has nothing for.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"perturb: got {kind!r}, known are {', '.join(get_args(Kind))}")
    if isinstance(task, HubTask):
        asked = task.asked(split)
        change = _paraphrased if kind == "paraphrase" else _shuffled if kind == "choices" else _respelt
        _check(task, asked, kind)
        return keep(asked, lambda each: change(each, kind, seed), task.on_empty, f"{task.name} {split}")
    if kind in ("paraphrase", "choices") or isinstance(task, ListOpsTask):
        raise ValueError(
            f"perturb: {kind} needs a task whose parts are known, which {type(task).__name__} is not; named tasks "
            "(HubTask) are, and typos and casing work with any text"
        )
    return [_retyped(example, kind, seed) for example in task.load(split)]


def _check(task: HubTask, asked: Sequence[Asked], kind: Kind) -> None:
    """Raise ValueError where a kind would change nothing."""
    for each in asked:
        if kind == "choices" and _listed(each):
            return
        if kind == "paraphrase" and each.record.paraphrases:
            return
        if kind in ("typos", "casing") and (each.question.turns or _prose(each)):
            return
    lacks = {"choices": "lists no choices", "paraphrase": "has no other wording"}.get(kind, "asks with no prose")
    if asked:
        raise ValueError(f"perturb: {task.name} {lacks}, so {kind} would change nothing")


def _listed(asked: Asked) -> bool:
    return "options" in holes(asked.record.prompt) and any(option.text for option in asked.question.options)


def _prose(asked: Asked) -> list[str]:
    """Fields of the prompt that may be respelt."""
    return [name for name in holes(asked.record.prompt) if name not in _FORMAT]


def _paraphrased(asked: Asked, kind: Kind, seed: int) -> Example:
    draw = _draw(asked.question, kind, seed)
    return asked.example(_pick(asked.record.paraphrases, draw))


def _shuffled(asked: Asked, kind: Kind, seed: int) -> Example:
    question = asked.question
    texts = [option.text for option in question.options]
    if not _listed(asked) or len(set(texts)) < 2:
        return asked.example()
    draw, order = _draw(question, kind, seed), list(range(len(texts)))
    while [texts[i] for i in order] == texts:
        order = _permutation(len(texts), draw)
    labels = [option.label for option in question.options]
    options = tuple(Option(label, texts[i]) for label, i in zip(labels, order, strict=True))
    answer = labels[order.index(labels.index(question.answer))]
    return asked._replace(question=replace(question, options=options, answer=answer)).example()


def _respelt(asked: Asked, kind: Kind, seed: int) -> Example:
    question = asked.question
    if question.turns:
        return _retyped(asked.example(), kind, seed)
    draw, names = _draw(question, kind, seed), set(_prose(asked))
    # One draw for all fields, so that a whole prompt is in large letters or none of it.
    respell = _speller(kind, draw)
    example = asked.example()
    fields = {name: respell(text) if name in names else text for name, text in question.fields.items()}
    changed = asked._replace(question=replace(question, fields=fields)).example()
    return replace(example, turns=(changed.turns[0], *example.turns[1:]))


def _retyped(example: Example, kind: Kind, seed: int) -> Example:
    """What a person wrote, respelt."""
    respell = _speller(kind, _draw(example.turns, kind, seed))
    turns = (Turn(t.role, respell(t.text)) if t.role in ("prompt", "user") else t for t in example.turns)
    return replace(example, turns=tuple(turns))


def _speller(kind: Kind, draw: Draw) -> Callable[[str], str]:
    if kind == "casing":
        return str.upper if draw() < 0.5 else str.lower
    return lambda text: misspelt(text, draw)


def misspelt(text: str, draw: Draw) -> str:
    """A text with typos inside some of its words: letters swapped, left out, or doubled. Numbers stay as they are.

    Args:
        draw: gives random numbers in [0, 1).
    """
    words = list(_WORD.finditer(text))
    count = max(1, round(TYPO_SHARE * len(words))) if words else 0
    chosen = sorted(_permutation(len(words), draw)[:count])
    parts, done = [], 0
    for index in chosen:
        word = words[index]
        parts += [text[done : word.start()], _pick(_typos(word[0]), draw)]
        done = word.end()
    return "".join(parts) + text[done:]


def _typos(word: str) -> list[str]:
    """Every way to misspell a word by one letter that is neither its first nor, where swapped, its last."""
    swapped = [word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(1, len(word) - 2)]
    missing = [word[:i] + word[i + 1 :] for i in range(1, len(word) - 1)]
    doubled = [word[:i] + word[i] + word[i:] for i in range(1, len(word) - 1)]
    return [typo for typo in (*swapped, *missing, *doubled) if typo != word]


def _draw(content: Question | tuple[Turn, ...], kind: Kind, seed: int) -> Draw:
    """Random numbers that belong to a content; only random() is promised to be the same in every Python."""
    return random.Random(f"{kind}/{seed}/{content!r}").random


def _pick(items: Sequence[T], draw: Draw) -> T:
    return items[int(draw() * len(items))]


def _permutation(n: int, draw: Draw) -> list[int]:
    order = list(range(n))
    for i in range(n - 1, 0, -1):
        j = int(draw() * (i + 1))
        order[i], order[j] = order[j], order[i]
    return order
