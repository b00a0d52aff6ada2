"""Neutral text, on which a model is to stay as it was."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxsteer.io import Tokenizer
from train.data import TokenizedExample
from train.data.text_files import read_text

NEUTRAL = Path(__file__).resolve().parent.parent / "neutral.txt"
"""Twenty short texts on everyday matters, one per line."""

LENGTH = 128
"""Maximum number of tokens of a text."""


def read_neutral(path: str | Path) -> list[str]:
    """The texts of a file, one per line.

    Raises:
        ValueError: naming the file: it cannot be read.
    """
    return [line for line in read_text(path).splitlines() if line.strip()]


def neutral_examples(texts: Sequence[str], tokenizer: Tokenizer, length: int = LENGTH) -> list[TokenizedExample]:
    """Texts as tokens; the second half of each counts as completion, as if the first had been the prompt.

    So steering of prompts and of answers both show in the second half.

    Args:
        texts: at least 2 of at least 4 tokens; shorter ones are left out.
        tokenizer: of the model.
        length: maximum number of tokens of a text; the rest is cut off.

    Raises:
        ValueError: fewer texts.
    """
    tokenised = []
    for number, text in enumerate(texts, 1):
        ids = np.asarray(tokenizer(text)["input_ids"][:length], np.int32)
        half = len(ids) // 2
        if len(ids) >= 4:
            tokenised.append(TokenizedExample(ids, np.arange(len(ids)) >= half, half, f"neutral text {number}"))
    if len(tokenised) < 2:
        raise ValueError(f"neutral text: need at least 2 texts of 4 tokens or more, one per line; got {len(tokenised)}")
    return tokenised
