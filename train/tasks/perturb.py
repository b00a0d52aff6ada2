"""Perturbed examples: the same questions with typos, in another casing, reworded, or with their choices reordered.

How an example changes is a function of (what it asks, kind, seed), not of its index, its file or the other examples.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, TypeVar, get_args

from train.data import Example
from train.data.examples import Turn
from train.tasks import AnyTask, HubTask, ListOpsTask, MixtureTask, Split
from train.tasks.hub import SourcedQuestion, make_all
from train.tasks.record import Option, Question, placeholders

Kind = Literal["typos", "casing", "paraphrase", "choices"]
"""typos       misspell one in seven of the words with four letters or more, at least one
casing      change the whole prompt to upper case or to lower case
paraphrase  use another wording around the question
choices     reorder the listed candidates; gold answer and completion follow
"""

TYPO_RATE = 1 / 7
"""Fraction of the words that can be misspelt."""

# Placeholders for text that says how to answer, or that is not prose.
_FIXED = {"options", "lead", "after", "given", "expression"}
_WORD = re.compile(r"[^\W\d_]{4,}")

Draw = Callable[[], float]
"""Returns a random number in [0, 1)."""

T = TypeVar("T")


def perturbed(task: AnyTask, split: Split, kind: Kind, seed: int = 0) -> list[Example]:
    """The examples of a split, each perturbed; same order and sources as `task.load(split)`.

    The gold answer stays the same, except with "choices". Completions and candidates keep their spelling, because
    they are what the model should produce.

    Args:
        task: any task for typos and casing; a `HubTask` for paraphrase and choices.
        split: the split to load.
        kind: how the examples are perturbed, see `Kind`.
        seed: random seed.

    Raises:
        ValueError: an unknown kind, or one that would leave the task unchanged.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"perturb: got {kind!r}, known are {', '.join(get_args(Kind))}")
    if isinstance(task, HubTask):
        questions = task.questions(split)
        change = {"paraphrase": _paraphrased, "choices": _reordered}.get(kind, _respelt)
        _check(task.name, questions, kind)
        make = lambda question: change(question, kind, seed)
        return make_all(questions, make, task.on_empty, f"{task.name} {split}")
    if isinstance(task, MixtureTask):
        return task.gather(split, lambda part: perturbed(part, split, kind, seed))
    if kind in ("paraphrase", "choices") or isinstance(task, ListOpsTask):
        raise ValueError(
            f"perturb: {kind} needs a task whose parts are known, which {type(task).__name__} is not; named tasks "
            "(HubTask) are, and typos and casing work with any text"
        )
    return [_retyped(example, kind, seed) for example in task.load(split)]


def _check(name: str, questions: Sequence[SourcedQuestion], kind: Kind) -> None:
    """Raise ValueError if a kind would change none of the questions of the task `name`."""
    changes: Callable[[SourcedQuestion], bool] = {
        "choices": _lists_options,
        "paraphrase": lambda question: bool(question.record.paraphrases),
    }.get(kind, lambda question: bool(question.question.turns or _prose(question)))
    if questions and not any(map(changes, questions)):
        lacks = {"choices": "lists no choices", "paraphrase": "has no other wording"}.get(kind, "asks with no prose")
        raise ValueError(f"perturb: {name} {lacks}, so {kind} would change nothing")


def _lists_options(question: SourcedQuestion) -> bool:
    """Whether the prompt lists the candidates."""
    listed = "options" in placeholders(question.record.prompt)
    return listed and any(option.text for option in question.question.options)


def _prose(question: SourcedQuestion) -> list[str]:
    """Placeholders of the prompt whose text may be respelt."""
    return [name for name in placeholders(question.record.prompt) if name not in _FIXED]


def _paraphrased(sourced: SourcedQuestion, kind: Kind, seed: int) -> Example:
    draw = _generator(sourced.question, kind, seed)
    return sourced.example(_pick(sourced.record.paraphrases, draw))


def _reordered(sourced: SourcedQuestion, kind: Kind, seed: int) -> Example:
    question = sourced.question
    texts = [option.text for option in question.options]
    if not _lists_options(sourced) or len(set(texts)) < 2:
        return sourced.example()
    draw, order = _generator(question, kind, seed), list(range(len(texts)))
    while [texts[i] for i in order] == texts:
        order = _permutation(len(texts), draw)
    labels = [option.label for option in question.options]
    options = tuple(Option(label, texts[i]) for label, i in zip(labels, order, strict=True))
    answer = labels[order.index(labels.index(question.answer))]
    return sourced._replace(question=replace(question, options=options, answer=answer)).example()


def _respelt(sourced: SourcedQuestion, kind: Kind, seed: int) -> Example:
    question = sourced.question
    if question.turns:
        return _retyped(sourced.example(), kind, seed)
    # One speller for all fields, so that the casing is the same in the whole prompt.
    respell = _speller(kind, _generator(question, kind, seed))
    names = set(_prose(sourced))
    fields = {name: respell(text) if name in names else text for name, text in question.fields.items()}
    example = sourced.example()
    changed = sourced._replace(question=replace(question, fields=fields)).example()
    return replace(example, turns=(changed.turns[0], *example.turns[1:]))


def _retyped(example: Example, kind: Kind, seed: int) -> Example:
    """The example with the user's turns respelt."""
    respell = _speller(kind, _generator(example.turns, kind, seed))
    turns = (Turn(t.role, respell(t.text)) if t.role in ("prompt", "user") else t for t in example.turns)
    return replace(example, turns=tuple(turns))


def _speller(kind: Kind, draw: Draw) -> Callable[[str], str]:
    if kind == "casing":
        return str.upper if draw() < 0.5 else str.lower
    return lambda text: misspelt(text, draw)


def misspelt(text: str, draw: Draw) -> str:
    """A text with typos inside some of its words: letters swapped, omitted or doubled. Numbers stay as they are.

    Args:
        text: any text.
        draw: returns random numbers in [0, 1).
    """
    words = list(_WORD.finditer(text))
    count = max(1, round(TYPO_RATE * len(words))) if words else 0
    chosen = sorted(_permutation(len(words), draw)[:count])
    parts, end = [], 0
    for index in chosen:
        word = words[index]
        parts += [text[end : word.start()], _pick(_typos(word[0]), draw)]
        end = word.end()
    return "".join(parts) + text[end:]


def _typos(word: str) -> list[str]:
    """Every misspelling of a word by one letter that keeps the first letter and, if letters are swapped, the last."""
    swapped = [word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(1, len(word) - 2)]
    missing = [word[:i] + word[i + 1 :] for i in range(1, len(word) - 1)]
    doubled = [word[:i] + word[i] + word[i:] for i in range(1, len(word) - 1)]
    return [typo for typo in (*swapped, *missing, *doubled) if typo != word]


def _generator(content: Question | tuple[Turn, ...], kind: Kind, seed: int) -> Draw:
    """Random numbers that depend on the content, through its repr: renaming its fields would change them.

    Python guarantees the same sequence across versions for random() alone.
    """
    return random.Random(f"{kind}/{seed}/{content!r}").random


def _pick(items: Sequence[T], draw: Draw) -> T:
    return items[int(draw() * len(items))]


def _permutation(n: int, draw: Draw) -> list[int]:
    order = list(range(n))
    for i in range(n - 1, 0, -1):
        j = int(draw() * (i + 1))
        order[i], order[j] = order[j], order[i]
    return order
