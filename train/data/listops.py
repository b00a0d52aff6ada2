"""ListOps: nested list operations on digits, such as `[MAX 2 [MIN 3 4 ] ]`, whose answer is one digit.

After Nangia and Bowman 2018 (arXiv 1804.06028) and Long Range Arena (Tay et al. 2020, arXiv 2011.04006).
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from train.data.examples import Example, Split
from train.data.text_files import read_text

Style = Literal["short", "compact", "tagged"]

# MED is the median; of an even count, the mean of the middle two rounded down, as in Long Range Arena.
OPERATIONS: dict[str, Callable[[Sequence[int]], int]] = {
    "MAX": max,
    "MIN": min,
    "MED": lambda v: (sorted(v)[(len(v) - 1) // 2] + sorted(v)[len(v) // 2]) // 2,
    "SM": lambda v: sum(v) % 10,
    "PM": lambda v: math.prod(v) % 10,
    "FIRST": lambda v: v[0],
    "LAST": lambda v: v[-1],
}

# Common tokenizers make every digit a token of its own, so the answer is one token, and the ids of prompt and
# completion concatenated are the ids of the whole text.
TEMPLATES: dict[Style, tuple[str, str]] = {
    "short": ("{expression} = ", "{answer}"),
    "compact": ("{expression}=", "{answer}"),
    "tagged": (
        "Work out the value of the list expression, a single digit, and write it as <answer>digit</answer>.\n"
        "{expression}\n",
        "<answer>{answer}</answer>",
    ),
}

MAX_FAILURES = 100_000
"""After this many consecutive rejected candidates, the settings are taken to allow no more problems."""


@dataclass(frozen=True)
class ListOps:
    """Settings of the ListOps generator. With the defaults a problem has 13 to 26 SmolLM2 tokens, answer included.

    Problems are distinct. If the settings allow few short ones, only counts in the ratio 8 : 1 : 1 (that of the
    partition into splits, see `split_of`) give every split the same distribution of lengths.
    """

    operations: tuple[str, ...] = ("MAX", "MIN", "MED", "SM")
    """Operations to draw from: MAX, MIN, MED (median), SM (sum modulo 10), PM (product modulo 10), FIRST, LAST."""
    max_depth: int = 3
    """Maximum nesting depth; 1 = a single list of digits."""
    max_args: int = 5
    """Maximum number of arguments of an operation (the minimum is 2)."""
    nesting: float = 0.3
    """Probability that an argument is a list, as long as max_depth allows it."""
    min_length: int = 5
    """Minimum length of an expression, in operators, digits and closing brackets."""
    max_length: int = 12
    """Maximum length of an expression, in the same units."""
    train: int = 16_000
    """Number of training problems."""
    validation: int = 2_000
    """Number of validation problems."""
    test: int = 2_000
    """Number of test problems."""
    balanced: bool = True
    """Make the ten answers equally frequent."""
    style: Style = "short"
    """Format: short ("[MAX 1 2 ] = "), compact (no spaces, a third fewer tokens) or tagged (asks for <answer> tags)."""
    prompt: str | None = None
    """Prompt template instead of the style's own; must contain {expression}."""
    seed: int = 0
    """Random seed for drawing problems; the partition into splits does not depend on it."""

    def __post_init__(self) -> None:
        """Reject settings that no problem can satisfy."""
        unknown = [o for o in self.operations if o not in OPERATIONS]
        if unknown or not self.operations or len(set(self.operations)) != len(self.operations):
            raise ValueError(
                f"ListOps operations: got {self.operations}, need distinct names among {', '.join(sorted(OPERATIONS))}"
            )
        if self.max_depth < 1 or self.max_args < 2:
            raise ValueError(
                f"ListOps: got max_depth {self.max_depth}, max_args {self.max_args}; need at least 1 and 2"
            )
        if not 0 <= self.nesting <= 1:
            raise ValueError(f"ListOps nesting: got {self.nesting}, need a probability in [0, 1]")
        if self.max_length < 4 or self.min_length > self.max_length:
            raise ValueError(
                f"ListOps: got min_length {self.min_length}, max_length {self.max_length}; need "
                "min_length <= max_length and max_length >= 4, the length of [MAX 1 2 ]"
            )
        for split in get_args(Split):
            if getattr(self, split) < 0:
                raise ValueError(f"ListOps {split}: got {getattr(self, split)} problems, need 0 or more")
        if self.style not in TEMPLATES:
            raise ValueError(f"ListOps style: got {self.style!r}, need one of {', '.join(sorted(TEMPLATES))}")
        if self.prompt is not None and "{expression}" not in self.prompt:
            raise ValueError(f"ListOps prompt: got {self.prompt!r}, it must contain {{expression}}")


def evaluate(expression: str) -> int:
    """The value of an expression, a digit.

    Args:
        expression: tokens separated by spaces, e.g. "[MAX 2 [MIN 3 4 ] ]".

    Raises:
        ValueError: the text is not exactly one well-formed expression.
    """
    stack: list[tuple[str, list[int]]] = []
    result: int | None = None
    for token in expression.split():
        if result is not None:
            raise ValueError(f"ListOps {expression!r}: {token!r} follows the end of the expression")
        if token[0] == "[" and token[1:] in OPERATIONS:
            stack.append((token[1:], []))
            continue
        if len(token) == 1 and token in "0123456789":
            value = int(token)
        elif stack and token == "]":
            name, values = stack.pop()
            if not values:
                raise ValueError(f"ListOps {expression!r}: {name} has no arguments")
            value = OPERATIONS[name](values)
        else:
            raise ValueError(
                f"ListOps {expression!r}: got {token!r}; an expression is a digit, or [OP followed by "
                f"expressions and a closing ], with OP one of {', '.join(sorted(OPERATIONS))}"
            )
        if stack:
            stack[-1][1].append(value)
        else:
            result = value
    if result is None:
        raise ValueError(f"ListOps {expression!r}: the expression is empty, or left open ({len(stack)} lists)")
    return result


def split_of(expression: str) -> Split:
    """The split of an expression: sha256 of its text modulo 10 is 0 for test, 1 for validation, else train.

    It depends on the text alone, and every problem of a split s satisfies split_of(expression) = s. So no expression
    occurs in two splits, whatever the seeds, settings or files that they come from.
    """
    bucket = int.from_bytes(hashlib.sha256(expression.encode()).digest(), "big") % 10
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


def example(expression: str, settings: ListOps, source: str) -> Example:
    """The example of one expression, formatted in the style of the settings."""
    prompt, completion = TEMPLATES[settings.style]
    prompt = prompt if settings.prompt is None else settings.prompt
    answer = str(evaluate(expression))
    written = expression.replace(" ", "") if settings.style == "compact" else expression
    return Example.of(prompt.replace("{expression}", written), completion.replace("{answer}", answer), source, answer)


def generate(settings: ListOps, split: Split) -> list[Example]:
    """Generate the problems of one split: a pure function of (settings, split).

    No expression occurs twice, within a split or across splits (see `split_of`). A larger number of problems begins
    with those of a smaller one. With `balanced`, a constant answer scores 10 %.

    Raises:
        ValueError: an unknown split, or settings that do not allow that many distinct problems.
    """
    if split not in get_args(Split):
        raise ValueError(f"ListOps split: got {split!r}, need one of {', '.join(get_args(Split))}")
    count: int = getattr(settings, split)
    # A string seed is hashed with SHA-512, so it is the same in every process.
    draw = random.Random(f"listops/{settings.seed}/{split}").random
    answers: dict[str, int] = {}
    per_answer = [0] * 10
    failures = 0
    while len(answers) < count:
        failures += 1
        if failures > MAX_FAILURES:
            raise ValueError(
                f"ListOps: found only {len(answers)} distinct {split} problems of {count} with {settings}; "
                "allow a wider range of lengths, more depth or arguments, fewer problems, or balanced=False"
            )
        tokens: list[str] = []
        _grow(tokens, settings, draw, depth=1)
        if not settings.min_length <= len(tokens) <= settings.max_length:
            continue
        expression = " ".join(tokens)
        if expression in answers or split_of(expression) != split:
            continue
        answer = evaluate(expression)
        if settings.balanced and per_answer[answer] > len(answers) // 10:
            continue
        answers[expression] = answer
        per_answer[answer] += 1
        failures = 0
    return [example(e, settings, f"listops/{split}:{i}") for i, e in enumerate(answers, 1)]


def _grow(tokens: list[str], settings: ListOps, draw: Callable[[], float], depth: int) -> None:
    """Append the tokens of one random list; gives up once there are more than max_length."""
    # Python guarantees the same sequence across versions for random() alone, so integers are derived from it.
    tokens.append("[" + settings.operations[int(draw() * len(settings.operations))])
    for _ in range(2 + int(draw() * (settings.max_args - 1))):
        if len(tokens) > settings.max_length:
            return
        if depth < settings.max_depth and draw() < settings.nesting:
            _grow(tokens, settings, draw, depth + 1)
        else:
            tokens.append(str(int(draw() * 10)))
    tokens.append("]")


def read_tsv(path: str | Path, settings: ListOps, split: Split) -> list[Example]:
    """Read the problems of one split from a file of `answer<TAB>expression` lines, the format of nyu-mll/spinn.

    The brackets ( and ) of binary trees are dropped. `split_of` partitions the file; of the settings, only style and
    prompt are used.

    Raises:
        ValueError: naming file and line: a malformed line or a wrong answer. Naming the file: no problem of the split.
    """
    examples = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        gold, tab, text = line.partition("\t")
        if not tab or not re.fullmatch("[0-9]", gold):
            raise ValueError(f"{path}:{number}: got {line[:60]!r}, expected a digit, a tab and an expression")
        expression = " ".join(text.replace("(", " ").replace(")", " ").split())
        try:
            value = evaluate(expression)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        if value != int(gold):
            raise ValueError(f"{path}:{number}: the answer given is {gold}, but {expression} is {value}")
        if split_of(expression) == split:
            examples.append(example(expression, settings, f"{path}:{number}"))
    if not examples:
        raise ValueError(f"{path}: no ListOps problem belongs to the split {split!r}")
    return examples
