"""A task's generation settings, read as the harness's Hugging Face model reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from jaxsteer.inference.draws import GREEDY, Sampling

DEFAULT_NEW_TOKENS = 256
"""Maximum number of tokens to generate where the task sets none; the harness's own default."""


@dataclass(frozen=True)
class Settings:
    """How one request wants to be answered.

    max_new_tokens  maximum number of tokens in the answer
    until           texts that end the answer and are left out of it
    sampling        how tokens are chosen
    """

    max_new_tokens: int
    until: tuple[str, ...]
    sampling: Sampling


def read_settings(asked: Mapping[str, Any], end_of_text: str, where: str) -> Settings:
    """Read the settings of a request.

    Args:
        asked: the task's `generation_kwargs`; `max_gen_toks` may have any of the names that the harness accepts.
        end_of_text: the text of the model's end token, which always ends an answer.
        where: names the request in messages.

    Raises:
        ValueError: a setting that nothing can be generated with.
    """
    try:
        settings: Mapping[str, Any] = normalize_gen_kwargs(dict(asked), DEFAULT_NEW_TOKENS)
        new_tokens = settings["max_gen_toks"]
        if new_tokens < 1:
            raise ValueError(f"the maximum number of new tokens must be at least 1, got {new_tokens}")
        until = handle_stop_sequences([text for text in settings["until"] if text], end_of_text)
        return Settings(new_tokens, tuple(until), _sampling(settings))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None


def _sampling(settings: Mapping[str, Any]) -> Sampling:
    """Greedy decoding unless the task samples; a task that samples without a temperature has 1, as in transformers."""
    if not settings["do_sample"]:
        return GREEDY
    given = {name: settings[name] for name in ("temperature", "top_k", "top_p") if settings.get(name) is not None}
    temperature = float(given.get("temperature", 1.0))
    return Sampling(temperature, int(given.get("top_k", 0)), float(given.get("top_p", 1.0)))
