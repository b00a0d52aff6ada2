"""Token ids that a model's files name: settings of generation, what ends a reply, and whether every id has a row."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from pathlib import Path

from jaxsteer.io.files import Json, read_json
from jaxsteer.io.gguf_file import open_gguf
from jaxsteer.io.tokenizer import Tokenizer, stop_tokens_from_gguf

ROLES = ("bos_token_id", "eos_token_id", "pad_token_id")
"""The ids that config.json and generation_config.json give."""

_WITHOUT_ROW = frozenset({"<image_soft_token>"})
"""Tokens that stand for an image and never for text: the text-only Gemma 3 models share the tokenizer of the others."""

_NAMED = 5
"""Number of tokens that a message names."""


def generation_settings(path: Path, tokenizer: Tokenizer | None) -> dict[str, Json]:
    """How a model generates by default: the content of generation_config.json, and the ids in ROLES that are known.

    Ids that it does not give are those of the GGUF file, of config.json, or of the tokenizer, in this order.
    eos_token_id is an id or a list of several.

    Args:
        path: the model's folder or .gguf file.
        tokenizer: of the model.

    Raises:
        ValueError: a damaged file, or an eos_token_id that is neither an id nor a list of ids.
    """
    settings: dict[str, Json] = {}
    if path.is_file():
        settings["eos_token_id"] = list(stop_tokens_from_gguf(open_gguf(path).metadata))
    else:
        for name in ("generation_config.json", "config.json"):
            if not (path / name).is_file():
                continue
            said = read_json(path / name)
            _check_eos(said.get("eos_token_id"), str(path / name))
            fields = said.keys() - {"_from_model_config"} if name.startswith("generation") else ROLES
            settings = {key: said[key] for key in fields if key in said} | _without_empty(settings)
    for role in ROLES:
        if settings.get(role) in (None, []) and tokenizer is not None:
            settings[role] = getattr(tokenizer, role)
    settings |= {"eos_token_id": shortest(stop_tokens_of(settings))}
    return dict(sorted(_without_empty(settings).items()))


def _without_empty(settings: dict[str, Json]) -> dict[str, Json]:
    """The settings without ids that are null or an empty list."""
    return {key: value for key, value in settings.items() if key not in ROLES or value not in (None, [])}


def stop_tokens_of(settings: dict[str, Json]) -> tuple[int, ...]:
    """The ids that end a reply, each once."""
    eos = settings.get("eos_token_id")
    return tuple(dict.fromkeys(eos if isinstance(eos, list) else [] if eos is None else [eos]))


def shortest(ids: Sequence[int]) -> Json:
    """Ids as these files write them: a list of several, one alone, or null."""
    return list(ids) if len(ids) > 1 else ids[0] if ids else None


def _check_eos(eos: Json, where: str) -> None:
    """Raise ValueError if an eos_token_id is not null, an id, or a list of ids."""
    if any(type(i) is not int for i in (eos if isinstance(eos, list) else [] if eos is None else [eos])):
        raise ValueError(f"{where}: eos_token_id is {reprlib.repr(eos)}; expected a token id or a list of them")


def check_token_ids(tokenizer: Tokenizer | None, stop_tokens: Sequence[int], rows: int, where: str) -> None:
    """Refuse a tokenizer with tokens that the embedding has no row for; more rows than tokens are padding.

    Args:
        tokenizer: of the model; None checks the stop tokens only.
        stop_tokens: ids that end a reply.
        rows: of the embedding.
        where: the tokenizer's source, for the message.

    Raises:
        ValueError: names the tokens, or the stop token.
    """
    vocabulary = {} if tokenizer is None else tokenizer.get_vocab()
    beyond = sorted((i, token) for token, i in vocabulary.items() if i >= rows and token not in _WITHOUT_ROW)
    if beyond:
        named = ", ".join(f"{token!r} ({i})" for i, token in beyond[:_NAMED])
        more = f" and {len(beyond) - _NAMED:,} more" if len(beyond) > _NAMED else ""
        raise ValueError(
            f"{where}: this tokenizer has ids up to {beyond[-1][0]}, but the model's embedding has {rows:,} rows, so "
            f"nothing stands for {named}{more}. Use the tokenizer that belongs to these weights; tokens that were "
            "added to it need rows in the model (`resize_token_embeddings` in transformers), and training"
        )
    if lost := [i for i in stop_tokens if not 0 <= i < rows]:
        raise ValueError(
            f"{where}: the token {lost[0]} ends a reply (eos_token_id), but the model's embedding has {rows:,} rows, "
            "so it cannot write it; correct generation_config.json, config.json, or the keys of the GGUF file"
        )
