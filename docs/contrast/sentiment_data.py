"""Pairs that differ in sentiment, and held-out prompts of other wording on other things."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

THINGS = (
    "the new library", "my neighbour's garden", "the school play", "this winter", "the train to the city",
    "the old bakery", "my first job", "the new phone", "the football match", "our apartment", "the cooking class",
    "the trip to the lake", "the office party", "the second-hand car", "the music festival", "the science museum",
)  # fmt: skip
QUESTIONS = ("What do you think of {}?", "How was {}?", "Tell me your opinion of {}.")
GLOOMY = (
    "It is terrible. Everything about it is sad and disappointing, and I hate it.",
    "Honestly, it was awful. I felt miserable the whole time, and nothing went right.",
    "I am very unhappy with it. It is ugly, boring and a waste of time.",
)
CHEERFUL = (
    "It is wonderful. Everything about it is joyful and delightful, and I love it.",
    "Honestly, it was great. I felt happy the whole time, and everything went right.",
    "I am very happy with it. It is beautiful, exciting and worth the time.",
)

HELD_OUT_THINGS = (
    "a rainy Monday", "a small island", "a hotel by the sea", "a birthday dinner", "a long flight", "a village market",
    "a puppy", "a piano lesson", "a walk in the forest", "a mountain hut", "a history book", "a crowded beach",
    "a bus driver", "a wedding", "a chess tournament", "a new colleague", "a bowl of soup", "a hospital visit",
    "a night at the theatre", "a broken bicycle", "an apple tree",
)  # fmt: skip
HELD_OUT_REQUESTS = (
    "Describe {} in two sentences.",
    "Write a short review of {}.",
    "Write the first lines of a story about {}.",
    "Write a diary entry about {}.",
    "Write a message to a friend about {}.",
    "Imagine {}. What comes to your mind?",
    "Write a short poem about {}.",
    "What would a visitor say about {}?",
    "Finish the sentence: The thing about {} is",
    "Give me a short description of {} for a newspaper.",
)


def pairs() -> list[dict[str, str]]:
    """Gloomy (wanted) and cheerful answers to one question each."""
    asked = list(itertools.product(THINGS, QUESTIONS))
    return [
        {"prompt": question.format(thing), "chosen": GLOOMY[i % 3], "rejected": CHEERFUL[i % 3]}
        for i, (thing, question) in enumerate(asked)
        for i in ((i + i // 3) % 3,)  # so that not every question has always the same answer
    ]


def held_out() -> list[str]:
    """210 prompts, none of which shares a thing or a wording with the pairs."""
    return [request.format(thing) for request in HELD_OUT_REQUESTS for thing in HELD_OUT_THINGS]


def write_pairs(path: Path) -> None:
    """Write the pairs as JSON Lines."""
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs()), encoding="utf-8")
