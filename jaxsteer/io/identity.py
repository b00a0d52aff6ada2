"""Which model a file belongs to: a fingerprint of its features, and what differs between two models, in words."""

from __future__ import annotations

import dataclasses
import hashlib
import json

from jaxsteer.io.files import Json
from jaxsteer.models.config import ModelConfig, RopeScaling


def config_to_json(config: ModelConfig) -> dict[str, Json]:
    """A model config as plain values; `config_from_json` reads it back."""
    return dataclasses.asdict(config)


def config_from_json(data: dict[str, Json]) -> ModelConfig:
    """The inverse of `config_to_json`.

    Raises:
        ValueError: a field that this version does not know, a wrong type, or values that no model can have.
    """
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    if unknown := sorted(set(data) - known):
        raise ValueError(f"model config: unknown fields {', '.join(unknown)}; written by a newer version?")
    values = dict(data)
    try:
        if values.get("rope_scaling") is not None:
            values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
        values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return ModelConfig(**values)
    except TypeError as error:
        raise ValueError(f"model config: {error}") from None


def fingerprint(config: ModelConfig) -> str:
    """The first 16 hex digits of the SHA-256 of a model's features.

    Fields at their defaults are left out, so that the fingerprint stays the same in a version with more features;
    so is `max_length`, which limits use and does not change the computation. Models of the same architecture and size
    share a fingerprint, whatever their weights.
    """
    fields = {
        field.name: value
        for field in dataclasses.fields(config)
        if field.name != "max_length" and (value := getattr(config, field.name)) != field.default
    }
    text = json.dumps(fields, sort_keys=True, default=dataclasses.asdict)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(here: ModelConfig, there: ModelConfig) -> list[str]:
    """What differs, a phrase for each field: "width 576 here, 2048 in the file"."""
    return [
        f"{field.name} {getattr(here, field.name)} here, {getattr(there, field.name)} in the file"
        for field in dataclasses.fields(ModelConfig)
        if field.name != "max_length" and getattr(here, field.name) != getattr(there, field.name)
    ]
