"""Answers in generated texts: how each rule of `train.tasks.scoring` reads one, and when two are the same."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

TOLERANCE = Fraction(1, 10_000)
"""Numbers that differ by less are equal: 33.3333 equals 100/3."""

# A currency sign may separate sign and digits. A minus after a digit or a word, or before a space, is a subtraction.
_PLAIN = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    rf"((?:(?<![\w)\]])[-+\u2212](?=[.\d$€£¥₹]))?)[$€£¥₹]?\s?((?:\d+\s+)?\d+\s*/\s*\d+(?![\d/])|{_PLAIN})"
)
_ANSWER_IS = re.compile(r"(?:answer\s*(?:is\b|:|=)\s*:?|####)\s*([^\n]*)", re.IGNORECASE)
_FRAC = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_TEX_SPACE = re.compile(r"\\[!,;: ]|\\(?=[$%])")

_WORD = r"(?i:answer|option|solution|ending|choice)"
# A bare letter must not continue as a text: "Answer: A cat" does not choose A.
_LABEL = r"(?:\(([A-Za-z1-9])\)|([A-Z1-9]|[a-h])(?=\s*(?:[.):,*]|\n|$))|([B-H1-9])(?=\s))"
_LABELLED = re.compile(rf"{_WORD}\s*(?i:is)?\s*[:=-]?\s*\**{_LABEL}")
_LABEL_FIRST = re.compile(rf"\s*{_LABEL}")
_BRACKETED = re.compile(r"\(([A-Ha-h1-9])\)")

_TRUTH = r"\b(true|false)\b"
_RELATION = r"\b(entail|neutral|contradict)"
_RELATIONS = {"entail": "entailment", "neutral": "neutral", "contradict": "contradiction"}


def _first(pattern: str) -> Callable[[str], str | None]:
    """A reader of the pattern's first match after "answer:", else of its first match; ignores case."""
    anywhere = re.compile(pattern, re.IGNORECASE | re.DOTALL)
    after_answer = re.compile(r"answer\s*(?:is\b|:|-).*?" + pattern, re.IGNORECASE | re.DOTALL)

    def read(text: str) -> str | None:
        match = after_answer.search(text) or anywhere.search(text)
        return match[1].lower() if match else None

    return read


def _digit(text: str) -> str | None:
    match = re.search(r"[0-9]", text)
    return match[0] if match else None


def _tagged(text: str) -> str | None:
    match = re.search(r"<answer>\s*(.*?)\s*</answer>", text, re.DOTALL)
    return match[1] if match else None


_read_stem = _first(_RELATION)


def _relation(text: str) -> str | None:
    stem = _read_stem(text)
    return _RELATIONS[stem] if stem else None


def number(text: str) -> str | None:
    """The number that a text gives as its answer, without thousands separators and currency: "-1234.5" or "3/4"."""
    text = _FRAC.sub(r"\1/\2", _TEX_SPACE.sub("", text.replace("{,}", ",")))
    stated = [match[1] for match in reversed(list(_ANSWER_IS.finditer(text)))]
    for part in (_boxed(text), *stated):
        # In "2 + 3 = 5" the answer is what follows the equals sign.
        if part is not None and (match := _NUMBER.search(part.rpartition("=")[2]) or _NUMBER.search(part)):
            return _clean(match)
    numbers = list(_NUMBER.finditer(text))
    return _clean(numbers[-1]) if numbers else None


def _boxed(text: str) -> str | None:
    """The text inside the last \\boxed{...}, which may contain braces."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for i in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if text[i] == "}" and depth == 0:
            return text[start + len("\\boxed{") : i]
    return None


def _clean(match: re.Match[str]) -> str:
    """A match of _NUMBER in one format."""
    sign = "-" if match[1] in ("-", "\u2212") else ""
    return sign + re.sub(r"\s*/\s*", "/", match[2].replace(",", ""))


def value(text: str) -> Fraction | None:
    """The value of what `number` returned; "2 1/2" is five halves. None if it has none, as "3/0"."""
    negative = text.startswith("-")
    whole, _, rest = text.removeprefix("-").rpartition(" ")
    try:
        size = Fraction(whole or 0) + Fraction(rest)
    except (ValueError, ZeroDivisionError):
        return None
    return -size if negative else size


def _label(last: bool) -> Callable[[str], str | None]:
    """A reader of the label in the first, or the last, "Answer: ..."."""

    def read(text: str) -> str | None:
        stated = list(_LABELLED.finditer(text))
        match = stated[-1 if last else 0] if stated else _LABEL_FIRST.match(text)
        if match:
            return next(filter(None, match.groups())).upper()
        bracketed = set(_BRACKETED.findall(text))
        return bracketed.pop().upper() if len(bracketed) == 1 else None

    return read


READERS: dict[str, Callable[[str], str | None]] = {
    "exact": str.strip,
    "digit": _digit,
    "tagged": _tagged,
    "number": number,
    "label": _label(last=False),
    "last_label": _label(last=True),
    "truth": _first(_TRUTH),
    "relation": _relation,
}
"""For each rule, the function that reads an answer; it returns None if there is none."""


def can_match(gold: str, rule: str) -> bool:
    """Whether some output could equal the gold answer: a number for the rule number, and so on."""
    gold = gold.strip()
    if rule == "number":
        return value(number(gold) or "") is not None
    if rule == "digit":
        return re.fullmatch("[0-9]", gold) is not None
    if rule in ("label", "last_label"):
        return re.fullmatch("[A-Z1-9]", _bare_label(gold)) is not None
    if rule in ("truth", "relation"):
        return gold.lower() in ("true", "false") if rule == "truth" else gold.lower() in _RELATIONS.values()
    return bool(gold)


def _bare_label(gold: str) -> str:
    """The label of a gold answer; labels may be words: Option1 is 1, answer3 is 3."""
    return re.sub(rf"^{_WORD}", "", gold).strip("() .").upper()


def same_answer(answer: str, gold: str, rule: str) -> bool:
    """Whether an answer read by a rule equals the gold answer, ignoring surrounding white space."""
    answer, gold = answer.strip(), gold.strip()
    if rule == "number":
        ours, theirs = value(answer), value(number(gold) or "")
        return ours is not None and theirs is not None and abs(ours - theirs) < TOLERANCE
    if rule in ("label", "last_label"):
        return answer == _bare_label(gold)
    if rule in ("truth", "relation"):
        return answer == gold.lower()
    return answer == gold
