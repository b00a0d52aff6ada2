"""How far training has moved a model's predictions on neutral text."""

from __future__ import annotations

from collections.abc import Sequence

from jaxsteer.params import Params
from jaxsteer.theory.compare import kl_from_base
from train.data import stack_rows
from train.devices.processes import fetch
from train.evaluation.evaluator import Evaluator
from train.evaluation.neutral import LENGTH, neutral_examples

ROWS = 8
"""Texts compared at a time."""


def divergences(evaluator: Evaluator, params: Params, texts: Sequence[str], *, length: int = LENGTH) -> list[float]:
    """KL(base ‖ trained) of each text, the mean over its tokens in nats.

    The second half of each text counts as completion, as if the first had been the prompt, and is what is measured, so
    steering of prompts and of answers both show.

    Args:
        evaluator: with the steered model.
        params: steering of its plan, and base weights if they were trained too.
        texts: at least 2.
        length: maximum number of tokens of a text.

    Returns:
        A figure for each text of at least 4 tokens.

    Raises:
        ValueError: fewer than 2 texts of at least 4 tokens.
    """
    tokenised = neutral_examples(texts, evaluator.loaded.require_tokenizer(), length)
    place, kls = evaluator.placement, []
    with place.on_mesh():
        steering = place.copies(params.steering)
        for start in range(0, len(tokenised), ROWS):
            some = tokenised[start : start + ROWS]
            batch = stack_rows([*([each] for each in some), *([] for _ in range(ROWS - len(some)))], length)
            kl = kl_from_base(evaluator.model, evaluator.loaded.base, steering, place.batch(batch), params.base)
            kls += [float(value) for value in fetch(kl)[: len(some)]]
    return kls
