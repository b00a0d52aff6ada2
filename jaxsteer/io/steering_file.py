"""A portable steering file: one safetensors file with a steering tree, its plan and the model it was made for.

Tensors are named "slot/site/param". The metadata holds, as text: the format and its version; the plan; the base
model's name, fingerprint, config and a sample of its weights; the versions of jaxsteer and jax; free notes; and SHA-256
digests of every tensor's bytes and of the metadata itself. Version 2 has no sample, version 1 also no digests.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.io.files import Json, parse_json
from jaxsteer.io.identity import config_from_json, config_to_json, differences, fingerprint
from jaxsteer.io.provenance import BaseOptions, library_version, provenance_of, training_settings
from jaxsteer.io.safetensors_file import ToWrite, open_safetensors, write_safetensors
from jaxsteer.io.sample import WeightSample, compare_samples, sample_from_json
from jaxsteer.io.stored import Stored
from jaxsteer.models.config import ModelConfig
from jaxsteer.plans import plan_from_json, plan_to_json, validate_plan
from jaxsteer.steering import param_specs
from jaxsteer.types import Plan, Steering

FORMAT = "jaxsteer-steering"
VERSIONS = ("1", "2", "3")
"""Versions that are read; the last one is written. 2 added the digests, 3 the sample of the base model's weights."""


@dataclass(frozen=True)
class SteeringFile:
    """The content of a steering file.

    path         where it was read from
    steering     steering[slot][site][param], each leaf [A, ...]
    plan         the slots of `steering`
    model_name   name of the base model, for display
    fingerprint  of the base model's config
    config       the base model's config
    versions     of jaxsteer and jax that wrote the file
    notes        what the writer added: any JSON
    sample       of the base model's weights; None if the writer had none, as before version 3
    """

    path: Path
    steering: Steering
    plan: Plan
    model_name: str
    fingerprint: str
    config: ModelConfig
    versions: dict[str, str] = field(default_factory=dict)
    notes: dict[str, Json] = field(default_factory=dict)
    sample: WeightSample | None = None

    @property
    def provenance(self) -> list[dict[str, Json]]:
        """How the steering came about, oldest step first: what made it ("by"), from what, with which settings."""
        return provenance_of(self.notes, self.model_name, self.plan)

    @property
    def base_options(self) -> BaseOptions:
        """How the base model was loaded in training.

        Raises:
            ValueError: the notes say something else than a place of the tokenizer.
        """
        settings = training_settings(self.notes)
        tokenizer = settings.get("tokenizer")
        if not isinstance(tokenizer, str | None):
            raise ValueError(f"{self.path}: its notes name the tokenizer {tokenizer!r:.80}; expected a text")
        return BaseOptions(settings.get("quantise") == "int8", tokenizer)

    def check(self, model_config: ModelConfig) -> None:
        """Refuse to steer another model than the one the file was made for.

        Raises:
            ValueError: `model_config` has other dimensions or features; the message names them.
        """
        if reasons := differences(model_config, self.config):
            raise ValueError(
                f"{self.path}: made for {self.model_name}, which is another model than this one: {'; '.join(reasons)}"
            )

    def check_weights(self, sample: WeightSample | None, *, other_base: bool = False) -> str:
        """Refuse to steer another model of the same config, such as the instruction-tuned sibling of a base model.

        Args:
            sample: of the model to steer, see `sample_weights` and `LoadedModel.sample`.
            other_base: steer it all the same.

        Returns:
            What the person who steers should know, a sentence; "" if the weights are the same.

        Raises:
            ValueError: the weights differ by more than the rounding of the forms in which they are stored.
        """
        if self.sample is None or sample is None:
            reason = "it says nothing of its base model's weights" if sample else "the model has no sample"
            return f"{self.path}: whether the weights are those of {self.model_name} cannot be checked: {reason}"
        found = compare_samples(sample, self.sample)
        if found.verdict == "same":
            return ""
        if found.verdict == "undecided":
            return f"{self.path}: whether the weights are those of {self.model_name} is unknown: {found.reason}"
        if found.verdict == "consistent":
            return f"{self.path}: the model is consistent with {self.model_name}: {found.reason}"
        if other_base:
            return f"{self.path}: made for {self.model_name}, steers another model: {found.reason}"
        raise ValueError(
            f"{self.path}: made for {self.model_name}, which is another model than this one: {found.reason}"
        )


def save_steering(
    path: str | Path,
    steering: Steering,
    plan: Plan,
    *,
    model_name: str,
    config: ModelConfig,
    notes: Mapping[str, Json] | None = None,
    sample: WeightSample | None = None,
) -> None:
    """Write a steering file atomically. Leaves keep their dtype.

    Args:
        path: the file, by convention *.safetensors; an existing one is replaced, missing folders are created.
        steering: the steering tree of `plan`.
        plan: its slots.
        model_name: name of the base model, for display.
        config: the base model's config.
        notes: anything that JSON can hold; of steering made from another file, see `derived_notes`.
        sample: of the base model's weights (`LoadedModel.sample`), for `SteeringFile.check_weights`.

    Raises:
        ValueError: the plan does not fit the config, or the steering does not fit the plan.
    """
    path = Path(path)
    validate_plan(plan, config)
    leaves = _leaves(steering)
    _check_tensors(leaves, plan, config, f"{path}: not written")
    metadata = {
        "format": FORMAT,
        "format_version": VERSIONS[-1],
        "plan": json.dumps(plan_to_json(plan)),
        "model_name": model_name,
        "fingerprint": fingerprint(config),
        "config": json.dumps(config_to_json(config)),
        "versions": json.dumps({"jaxsteer": library_version(), "jax": jax.__version__}),
        "notes": json.dumps(dict(notes or {})),
        "base_sample": json.dumps(None if sample is None else sample.to_json()),
        "tensor_sha256": json.dumps({name: _digest_of_tensor(np.asarray(leaf)) for name, leaf in leaves.items()}),
    }
    metadata["metadata_sha256"] = _digest_of_metadata(metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = [
        ToWrite(name, leaf.shape, np.dtype(leaf.dtype), functools.partial(np.asarray, leaf))
        for name, leaf in leaves.items()
    ]
    write_safetensors(path, tensors, metadata)


def load_steering(path: str | Path) -> SteeringFile:
    """Read a steering file; `SteeringFile.check` then compares it with a model.

    Raises:
        ValueError: the file is damaged (a digest differs), of another kind, of a newer version, or does not hold what
            its plan says. The message names the file, and the tensors or the part of the metadata.
    """
    path = Path(path)
    stored, metadata = open_safetensors(path)
    _check_version(metadata, path)
    digests = _verified_digests(metadata, path)
    file = _parse_metadata(metadata, path)
    plan, config = file.plan, file.config
    try:
        validate_plan(plan, config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    _check_tensors(stored, plan, config, str(path))
    read = lambda slot, site, param: jnp.asarray(_read_tensor(stored, f"{slot}/{site}/{param}", digests, path))
    steering = {
        slot: {site: {param: read(slot, site, param) for param in params} for site, params in sites.items()}
        for slot, sites in param_specs(plan, config).items()
    }
    return replace(file, steering=steering)


def _check_version(metadata: Mapping[str, str], path: Path) -> None:
    """Refuse a file of another kind, or of a version that is not read here."""
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: not a steering file (its metadata does not say format={FORMAT!r})")
    if (written := metadata.get("format_version")) not in VERSIONS:
        raise ValueError(
            f"{path}: steering format {written}, this version of jaxsteer reads {', '.join(VERSIONS)}; use the version "
            "that wrote it, or a newer one"
        )


def _verified_digests(metadata: Mapping[str, str], path: Path) -> dict[str, str] | None:
    """The tensors' digests by name, once the metadata matches its own; None for a file of version 1, which has none."""
    if metadata["format_version"] == "1":
        return None
    if metadata.get("metadata_sha256") != _digest_of_metadata(metadata):
        raise ValueError(f"{path}: the metadata is damaged: it does not match its SHA-256 digest. Copy the file again")
    return _metadata_json(metadata, "tensor_sha256", path)


def _parse_metadata(metadata: Mapping[str, str], path: Path) -> SteeringFile:
    """The content of the metadata, with an empty steering tree."""
    try:
        config = config_from_json(_metadata_json(metadata, "config", path))
        plan = plan_from_json(_metadata_json(metadata, "plan", path))
        notes, versions = (_metadata_json(metadata, key, path) for key in ("notes", "versions"))
        stored = _metadata_json(metadata, "base_sample", path) if "base_sample" in metadata else None
        file = SteeringFile(
            path,
            {},
            plan,
            metadata["model_name"],
            metadata["fingerprint"],
            config,
            versions=versions,
            notes=notes,
            sample=None if stored is None else sample_from_json(stored),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: the metadata cannot be read ({error})") from None
    if file.fingerprint != fingerprint(config):
        raise ValueError(
            f"{path}: the fingerprint {file.fingerprint} is not that of the config beside it; the file was altered"
        )
    return file


def _metadata_json(metadata: Mapping[str, str], key: str, path: Path) -> Json:
    return parse_json(metadata[key], f"{path}: {key} in the metadata")


def _read_tensor(stored: Mapping[str, Stored], name: str, digests: Mapping[str, str] | None, path: Path) -> np.ndarray:
    """A tensor whose bytes match their digest, where there is one."""
    value = stored[name].read()
    if digests is not None and digests.get(name) != _digest_of_tensor(value):
        raise ValueError(f"{path}: {name} is damaged: its bytes do not match their SHA-256 digest. Copy the file again")
    return value


def _digest_of_tensor(value: np.ndarray) -> str:
    """SHA-256 of a tensor's bytes as they are in the file, in hex."""
    return hashlib.sha256(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data).hexdigest()


def _digest_of_metadata(metadata: Mapping[str, str]) -> str:
    """SHA-256 of all entries but the digest itself, as JSON with sorted keys, in hex."""
    signed = {key: value for key, value in metadata.items() if key != "metadata_sha256"}
    return hashlib.sha256(json.dumps(signed, sort_keys=True).encode()).hexdigest()


def check_steering(steering: Steering, plan: Plan, config: ModelConfig, where: str) -> None:
    """Refuse a steering tree that is not that of a plan, or has values that are not finite.

    Raises:
        ValueError: it begins with `where`.
    """
    leaves = _leaves(steering)
    _check_tensors(leaves, plan, config, where)
    if wrong := [name for name, leaf in leaves.items() if not jnp.isfinite(leaf).all()]:
        raise ValueError(f"{where}: {', '.join(wrong[:5])} has values that are not finite")


class _Shaped(Protocol):
    """An array, or a tensor in a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...


def _leaves(steering: Steering) -> dict[str, jax.Array]:
    """The leaves by their names in the file."""
    return {
        f"{slot}/{site}/{param}": leaf
        for slot, sites in steering.items()
        for site, params in sites.items()
        for param, leaf in params.items()
    }


def _check_tensors(leaves: Mapping[str, _Shaped], plan: Plan, config: ModelConfig, where: str) -> None:
    """Compare names, shapes and (of arrays) dtypes with what the plan's methods declare."""
    layers = {slot.name: len(slot.active_layers(config.layers)) for slot in plan}
    expected = {
        f"{slot}/{site}/{param}": (layers[slot], *spec.shape)
        for slot, sites in param_specs(plan, config).items()
        for site, params in sites.items()
        for param, spec in params.items()
    }
    problems = [f"{name} is missing" for name in expected if name not in leaves]
    problems += [f"{name} is not in the plan" for name in leaves if name not in expected]
    problems += [
        f"{name} has shape {list(leaves[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in leaves and tuple(leaves[name].shape) != shape
    ]
    dtypes = {name: leaf.dtype for name, leaf in leaves.items() if hasattr(leaf, "dtype")}
    problems += [
        f"{name} has dtype {dtype}, expected a float type"
        for name, dtype in dtypes.items()
        if not jnp.issubdtype(dtype, jnp.floating)
    ]
    if problems:
        raise ValueError(f"{where}: the tensors do not fit the plan: {'; '.join(problems)}")
