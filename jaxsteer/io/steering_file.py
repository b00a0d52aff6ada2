"""A portable steering file: one safetensors file with the steering pytree, its plan and its model.

Tensors are named "slot/site/param"; the file's metadata holds, as text, the format's version, the plan as
JSON, the base model's name, fingerprint and config, the versions of jaxsteer and jax, and free notes.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.io.identity import config_from_json, config_to_json, differences, fingerprint
from jaxsteer.io.safetensors_file import ToWrite, open_safetensors, write_safetensors
from jaxsteer.models.config import ModelConfig
from jaxsteer.plans import plan_from_json, plan_to_json, validate_plan
from jaxsteer.steering import param_specs
from jaxsteer.types import Plan, Steering

FORMAT = "jaxsteer-steering"
VERSION = 1


@dataclass(frozen=True)
class SteeringFile:
    """What a steering file holds.

    steering     steering[slot][site][param], each leaf [A, ...]
    plan         the slots that it belongs to
    model_name   the base model's name, for people
    fingerprint  of the base model's config
    config       the base model's config
    versions     of jaxsteer and jax that wrote it
    notes        free text values of whoever wrote it
    """

    steering: Steering
    plan: Plan
    model_name: str
    fingerprint: str
    config: ModelConfig
    versions: dict[str, str] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


def save_steering(
    path: str | Path,
    steering: Steering,
    plan: Plan,
    *,
    model_name: str,
    config: ModelConfig,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write a steering file, whole or not at all. Leaves keep their dtype.

    Args:
        path: where to, by custom *.safetensors; an existing file is replaced.
        steering: the steering pytree of `plan`.
        plan: its slots.
        model_name: the base model's name, for people.
        config: the base model's config.
        notes: anything that JSON can hold.

    Raises:
        ValueError: the plan does not fit the config, or the steering does not fit the plan.
    """
    path = Path(path)
    validate_plan(plan, config)
    leaves = _leaves(steering)
    _check(leaves, plan, config, f"{path}: not written")
    metadata = {
        "format": FORMAT,
        "format_version": str(VERSION),
        "plan": json.dumps(plan_to_json(plan)),
        "model_name": model_name,
        "fingerprint": fingerprint(config),
        "config": json.dumps(config_to_json(config)),
        "versions": json.dumps({"jaxsteer": _version(), "jax": jax.__version__}),
        "notes": json.dumps(dict(notes or {})),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = [
        ToWrite(name, leaf.shape, np.dtype(leaf.dtype), functools.partial(np.asarray, leaf))
        for name, leaf in leaves.items()
    ]
    write_safetensors(path, tensors, metadata)


def load_steering(path: str | Path, config: ModelConfig | None = None) -> SteeringFile:
    """Read a steering file.

    Args:
        path: the file.
        config: of the model that it is to steer; None to look at the file by itself.

    Raises:
        ValueError: the file is damaged, of another kind or from a newer version, does not hold what its plan
            says, or belongs to a model of other dimensions than `config` (the message names them).
    """
    path = Path(path)
    stored, metadata = open_safetensors(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: not a steering file (its metadata does not say format={FORMAT!r})")
    if metadata.get("format_version") != str(VERSION):
        raise ValueError(
            f"{path}: steering format {metadata.get('format_version')}, this version of jaxsteer reads "
            f"{VERSION}; use the version that wrote it, or a newer one"
        )
    try:
        own = config_from_json(json.loads(metadata["config"]))
        plan = plan_from_json(json.loads(metadata["plan"]))
        notes, versions = json.loads(metadata["notes"]), json.loads(metadata["versions"])
        name, mark = metadata["model_name"], metadata["fingerprint"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: the metadata cannot be read ({error})") from None
    if mark != fingerprint(own):
        raise ValueError(f"{path}: the fingerprint {mark} is not that of the config beside it; the file was altered")
    if config is not None and (reasons := differences(config, own)):
        raise ValueError(f"{path}: made for {name}, which is another model than this one: {'; '.join(reasons)}")
    try:
        validate_plan(plan, own)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    _check(stored, plan, own, str(path))
    steering: Steering = {}
    for slot in plan:
        for site in slot.sites:
            read = {
                param: jnp.asarray(stored[f"{slot.name}/{site}/{param}"].read())
                for param in param_specs(plan, own)[slot.name][site]
            }
            steering.setdefault(slot.name, {})[site] = read
    return SteeringFile(steering, plan, name, mark, own, versions, notes)


def _leaves(steering: Steering) -> dict[str, Any]:
    return {
        f"{slot}/{site}/{param}": leaf
        for slot, sites in steering.items()
        for site, params in sites.items()
        for param, leaf in params.items()
    }


def _check(leaves: Mapping[str, Any], plan: Plan, config: ModelConfig, where: str) -> None:
    """Compare names and shapes with what the plan's methods declare."""
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
    problems += [
        f"{name} has dtype {leaf.dtype}, expected a float type"
        for name, leaf in leaves.items()
        if hasattr(leaf, "dtype") and not jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    if problems:
        raise ValueError(f"{where}: the tensors do not fit the plan: {'; '.join(problems)}")


def _version() -> str:
    try:
        return version("jaxsteer")
    except PackageNotFoundError:  # used from a checkout
        return "unknown"
