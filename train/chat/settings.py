"""What the next message is answered with, and how commands change it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jaxsteer.inference.draws import GREEDY, Sampling
from jaxsteer.types import Plan
from train.chat.conversation import Mode, Voice
from train.evaluation.strength import parse_strength

CHAT_TOKENS, COMPLETION_TOKENS = 256, 64
"""Longest answers where nothing else is said; in completion mode an adapter's training says it."""


@dataclass(frozen=True)
class Settings:
    """What the next message is answered with.

    adapter         name of the adapter; None where only the base model is loaded
    base            the base model answers, in the adapter's mode and template
    strengths       of the slots whose strength is not 1, by adapter
    mode            None for the adapter's own
    system          the system message
    sampling        how tokens are chosen
    seed            random seed
    max_new_tokens  longest answer; None for the mode's own
    """

    adapter: str | None = None
    base: bool = False
    strengths: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    mode: Mode | None = None
    system: str | None = None
    sampling: Sampling = GREEDY
    seed: int = 0
    max_new_tokens: int | None = None

    @property
    def voice(self) -> Voice:
        """Who answers."""
        return Voice() if self.base else self.steered

    @property
    def steered(self) -> Voice:
        """The adapter at its strength."""
        return Voice(self.adapter, self.strengths.get(self.adapter or "", {}))

    def with_strength(self, words: list[str], plan: Plan) -> Settings:
        """The settings with another strength of the adapter: "0.5" for all slots, or "slot=0.5" for some.

        Raises:
            ValueError: there is no adapter, no finite number, or no such slot.
        """
        if self.adapter is None:
            raise ValueError("/strength: nothing is steered here; start the chat with a steering file")
        if all("=" in word for word in words):
            given = {word.partition("=")[0] for word in words}
            words = [
                *words,
                *(f"{name}={value!r}" for name, value in self.steered.strength.items() if name not in given),
            ]
        strength = parse_strength(words, plan, option="/strength") or {}
        return replace(self, strengths={**self.strengths, self.adapter: strength}, base=False)


def label(voice: Voice, plan: Plan) -> str:
    """A voice in short: "base", "NAME", "NAME 0.5" or "NAME lora=0.5"."""
    if voice.model is None:
        return "base"
    values = [voice.strength.get(slot.name, 1.0) for slot in plan]
    if len(set(values)) == 1:
        return voice.model if values[0] == 1 else f"{voice.model} {values[0]:g}"
    return " ".join([voice.model, *(f"{name}={value:g}" for name, value in voice.strength.items())])


def _sampled(name: str, read: Callable[[str], Any]) -> Callable[[Settings, str], Settings]:
    return lambda settings, text: replace(settings, sampling=replace(settings.sampling, **{name: read(text)}))


def _seeded(settings: Settings, text: str) -> Settings:
    if not 0 <= int(text) < 1 << 32:
        raise ValueError("out of range")
    return replace(settings, seed=int(text))


def _limited(settings: Settings, text: str) -> Settings:
    if int(text) < 1:
        raise ValueError("out of range")
    return replace(settings, max_new_tokens=int(text))


_NUMBERS: Mapping[str, tuple[Callable[[Settings, str], Settings], str]] = {
    "temperature": (_sampled("temperature", float), "a number of at least 0 (0: always the most likely token)"),
    "top_k": (_sampled("top_k", int), "a whole number of at least 0 (0: all tokens)"),
    "top_p": (_sampled("top_p", float), "a number above 0 and at most 1 (1: all tokens)"),
    "seed": (_seeded, "a whole number from 0 to 2**32 - 1"),
    "max": (_limited, "a whole number of at least 1"),
}
NUMBERS = tuple(_NUMBERS)
"""The settings that are one number each, by the name of their command."""


def with_number(settings: Settings, name: str, text: str) -> Settings:
    """The settings with another number, of those in NUMBERS.

    Raises:
        ValueError: not such a number; the message says what is allowed.
    """
    change, allowed = _NUMBERS[name]
    try:
        return change(settings, text)
    except ValueError:
        raise ValueError(f"/{name} {text}: give {allowed}") from None


def number_of(settings: Settings, name: str) -> float | int | None:
    """The value of a setting in NUMBERS."""
    if name == "seed":
        return settings.seed
    return settings.max_new_tokens if name == "max" else getattr(settings.sampling, name)
