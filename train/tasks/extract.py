"""Answers in generated texts: how each rule of `train.tasks.scoring` finds one, and when two are the same."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

TOLERANCE = Fraction(1, 10_000)
"""Numbers closer than this are equal: 33.3333 is a third of a hundred."""

# A currency sign may stand between sign and digits; a minus after a digit or a word, or before a space, subtracts.
_PLAIN = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    rf"((?:(?<![\w)\]])[-+\u2212](?=[.\d$€£¥₹]))?)[$€£¥₹]?\s?((?:\d+\s+)?\d+\s*/\s*\d+(?![\d/])|{_PLAIN})"
)
_ANSWER_IS = re.compile(r"(?:answer\s*(?:is\b|:|=)\s*:?|####)\s*([^\n]*)", re.IGNORECASE)
_FRAC = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_TEX_SPACE = re.compile(r"\\[!,;: ]|\\(?=[$%])")

_WORD = r"(?i:answer|option|solution|ending|choice)"
# A bare letter must end there, or "Answer: A cat" would be read as A.
_LABEL = r"(?:\(([A-Za-z1-9])\)|([A-Z1-9]|[a-h])(?=\s*(?:[.):,*]|\n|$))|([B-H1-9])(?=\s))"
_LABELLED = re.compile(rf"{_WORD}\s*(?i:is)?\s*[:=-]?\s*\**{_LABEL}")
_LABEL_FIRST = re.compile(rf"\s*{_LABEL}")
_BRACKETED = re.compile(r"\(([A-Ha-h1-9])\)")

_TRUTH = r"\b(true|false)\b"
_RELATION = r"\b(entail|neutral|contradict)"
_RELATIONS = {"entail": "entailment", "neutral": "neutral", "contradict": "contradiction"}


def _first(pattern: str) -> Callable[[str], str | None]:
    """The first match's group, whatever its case, lower-cased."""
    compiled = re.compile(pattern, re.IGNORECASE | re.DOTALL)
    after = re.compile(r"answer\s*(?:is\b|:|-).*?" + pattern, re.IGNORECASE | re.DOTALL)

    def read(text: str) -> str | None:
        found = after.search(text) or compiled.search(text)
        return found[1].lower() if found else None

    return read


def _digit(text: str) -> str | None:
    found = re.search(r"[0-9]", text)
    return found[0] if found else None


def _tagged(text: str) -> str | None:
    found = re.search(r"<answer>\s*(.*?)\s*</answer>", text, re.DOTALL)
    return found[1] if found else None


def _relation(text: str) -> str | None:
    found = _first(_RELATION)(text)
    return _RELATIONS[found] if found else None


def number(text: str) -> str | None:
    """The number that a text gives as its answer, without separators and currency: "-1234.5" or "3/4"."""
    text = _FRAC.sub(r"\1/\2", _TEX_SPACE.sub("", text.replace("{,}", ",")))
    for part in (_boxed(text), *(found[1] for found in reversed(list(_ANSWER_IS.finditer(text))))):
        # Of "2 + 3 = 5" the result counts.
        if part is not None and (found := _NUMBER.search(part.rpartition("=")[2]) or _NUMBER.search(part)):
            return _clean(found)
    every = list(_NUMBER.finditer(text))
    return _clean(every[-1]) if every else None


def _boxed(text: str) -> str | None:
    """The inside of the last \\boxed{...}, braces within it counted."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for at in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if text[at] == "}" and depth == 0:
            return text[start + len("\\boxed{") : at]
    return None


def _clean(found: re.Match[str]) -> str:
    sign = "-" if found[1] in ("-", "\u2212") else ""
    return sign + re.sub(r"\s*/\s*", "/", found[2].replace(",", ""))


def value(text: str) -> Fraction | None:
    """A cleaned number's value; "2 1/2" is five halves. None for what is none."""
    negative = text.startswith("-")
    whole, _, rest = text.removeprefix("-").rpartition(" ")
    try:
        size = Fraction(whole or 0) + Fraction(rest)
    except (ValueError, ZeroDivisionError):
        return None
    return -size if negative else size


def _label(last: bool) -> Callable[[str], str | None]:
    def read(text: str) -> str | None:
        stated = list(_LABELLED.finditer(text))
        found = stated[-1 if last else 0] if stated else _LABEL_FIRST.match(text)
        if found:
            return next(filter(None, found.groups())).upper()
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
"""How each rule reads an answer; None where there is none."""


def same(answer: str, gold: str, rule: str) -> bool:
    """Whether an answer that was read is the gold one, white space around both left aside."""
    answer, gold = answer.strip(), gold.strip()
    if rule == "number":
        ours, theirs = value(answer), value(number(gold) or "")
        return ours is not None and theirs is not None and abs(ours - theirs) < TOLERANCE
    if rule in ("label", "last_label"):
        # Labels may be words: Option1 is 1, answer3 is 3.
        return answer == re.sub(rf"^{_WORD}", "", gold).strip("() .").upper()
    if rule in ("truth", "relation"):
        return answer == gold.lower()
    return answer == gold
