"""jaxsteer.json, beside every export: what was written, from what, and how exact it is; and the plan that it came from.

Other programs have no word for most of a plan (several slots, positions, true ranks). Where the factors stand in the
files as they were trained, `restore` gives back the plan and the leaves, bit for bit.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.interventions import DoRA, LinearSteering, LoRA, NonlinearSteering, PiSSA
from jaxsteer.io.files import Json, read_json, write_json
from jaxsteer.io.identity import config_to_json
from jaxsteer.io.provenance import library_version
from jaxsteer.io.sample import WeightSample, compare_samples, sample_from_json
from jaxsteer.io.steered import SteeredModel
from jaxsteer.plans import plan_from_json, plan_to_json, validate_plan
from jaxsteer.types import Array, Intervention, Plan, Positions, Steering

NAME = "jaxsteer.json"


@dataclass(frozen=True)
class Sidecar:
    """The content of a jaxsteer.json that is read again.

    format       that the folder is in
    plan         that was exported
    source       of the base model
    fingerprint  of its config
    sample       of its weights, if known
    notes        of the training
    lost         what the files do not hold
    """

    format: str
    plan: Plan
    source: str
    fingerprint: str
    sample: WeightSample | None
    notes: Mapping[str, Json]
    lost: tuple[str, ...]


def write_sidecar(folder: Path, name: str, steered: SteeredModel, verdict: Mapping[str, Json]) -> None:
    """Write jaxsteer.json into a folder whose other files are complete; it has their SHA-256."""
    loaded, files = steered.loaded, sorted(path for path in folder.iterdir() if path.is_file())
    write_json(
        folder / NAME,
        {
            "jaxsteer": library_version(),
            "format": name,
            "plan": plan_to_json(steered.plan),
            "base": {
                "source": steered.source or loaded.name,
                "fingerprint": loaded.fingerprint,
                "sample": None if loaded.sample is None else loaded.sample.to_json(),
                "config": config_to_json(loaded.config),
            },
            "verdict": dict(verdict),
            "lost": list(steered.lost),
            "versions": {"jax": jax.__version__, "numpy": np.__version__},
            "files": {path.name: _sha256(path) for path in files if path.name != NAME},
            "notes": dict(steered.notes),
        },
    )


def read_sidecar(path: Path) -> Sidecar | None:
    """The sidecar beside a file or in a folder; None if there is none.

    Raises:
        ValueError: there is one, but not as `write_sidecar` writes it.
    """
    file = (path if path.is_dir() else path.parent) / NAME
    if not file.is_file():
        return None
    data = read_json(file)
    if "format" not in data:  # beside the weights of a fine-tuned model: how it was trained
        return None
    if path.is_file() and path.name not in (data.get("files") or ()):  # it is about the other files there
        return None
    try:
        base, stored = data["base"], data["base"]["sample"]
        texts = (data["format"], base["source"], base["fingerprint"], *data["lost"])
        if not all(isinstance(text, str) for text in texts) or not isinstance(data["lost"], list):
            raise TypeError("a field is no text")
        if not isinstance(data["notes"], dict):
            raise TypeError("notes is no object")
        return Sidecar(
            format=data["format"],
            plan=plan_from_json(data["plan"]),
            source=base["source"],
            fingerprint=base["fingerprint"],
            sample=None if stored is None else sample_from_json(stored),
            notes=data["notes"],
            lost=tuple(data["lost"]),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); delete it to load the rest without it") from None


def check_base(sidecar: Sidecar, steered: SteeredModel, where: str, *, other_base: bool = False) -> None:
    """Refuse a base model that is not the one that an export was made for.

    Raises:
        ValueError: another config, or weights that differ by more than rounding (unless `other_base`).
    """
    loaded = steered.loaded
    if loaded.fingerprint != sidecar.fingerprint:
        raise ValueError(f"{where}: made for {sidecar.source}, whose config is not that of {loaded.name}; give --model")
    if other_base or loaded.sample is None or sidecar.sample is None:
        return
    found = compare_samples(loaded.sample, sidecar.sample)
    if found.verdict == "another":
        raise ValueError(
            f"{where}: made for {sidecar.source}, which is another model than {loaded.name}: {found.reason}. "
            "Give the model that it was made for (--model), or this one on purpose: --other-base"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def restore(plan: Plan, steered: SteeredModel) -> SteeredModel:
    """The steering in the terms of the plan that it was exported from; as it is, where the files do not hold those.

    Args:
        plan: of the sidecar.
        steered: what the files hold.
    """
    config = steered.loaded.config
    try:
        validate_plan(plan, config)
    except ValueError:
        return steered
    found: dict[tuple[str, int], list[tuple[Intervention, Positions, dict[str, np.ndarray]]]] = {}
    for slot in steered.plan:
        for site in slot.sites:
            for at, layer in enumerate(slot.active_layers(config.layers)):
                params = {name: np.asarray(leaf[at]) for name, leaf in steered.steering[slot.name][site].items()}
                found.setdefault((site, layer), []).append((slot.method, slot.positions, params))
    restored: Steering = {}
    for slot in plan:
        restored[slot.name] = {}
        for site in slot.sites:
            here = [found.pop((site, layer), []) for layer in slot.active_layers(config.layers)]
            alone = [there[0] for there in here if len(there) == 1]
            ours = [_as(slot.method, method, p) for method, where, p in alone if where == slot.positions]
            whole = [p for p in ours if p is not None]
            if len(whole) < len(here):
                return steered
            restored[slot.name][site] = {name: _stack([p[name] for p in whole]) for name in whole[0]}
    return steered if found else replace(steered, plan=plan, steering=restored)


def _stack(leaves: list[np.ndarray]) -> Array:
    return jnp.asarray(np.stack(leaves))


def _as(wanted: Intervention, method: Intervention, p: dict[str, np.ndarray]) -> dict[str, np.ndarray] | None:
    """One layer's parameters in the terms of the method that was trained; None if they are not its own.

    Ranks may have been padded with zeros.
    """
    if wanted == method:
        return p
    rank = getattr(wanted, "rank", 0)
    if isinstance(wanted, LoRA) and isinstance(method, LoRA):
        same_kind = isinstance(wanted, DoRA) == isinstance(method, DoRA)
        if not (same_kind and math.isclose(wanted.scale, method.scale, rel_tol=1e-9)):
            return None
        if isinstance(wanted, PiSSA) and not isinstance(method, PiSSA):
            first, second = _cut(p, "A", "B", 0, rank), _cut(p, "A", "B", rank, 2 * rank)
            if first is None or second is None or not _zero_beyond(p, "A", "B", 2 * rank):
                return None
            return {**first, "A0": second["A"], "B0": -second["B"]}
        cut = _cut(p, "A", "B", 0, rank) if _zero_beyond(p, "A", "B", rank) else None
        return cut if cut is None or "m" not in p else {**cut, "m": p["m"]}
    if isinstance(wanted, LinearSteering | NonlinearSteering) and type(wanted) is type(method):
        assert isinstance(method, LinearSteering | NonlinearSteering)
        same = math.isclose(wanted.alpha, method.alpha, rel_tol=1e-9)
        same &= getattr(wanted, "activation", None) == getattr(method, "activation", None)
        return _cut(p, "D", "U", 0, rank) if same and _zero_beyond(p, "D", "U", rank) else None
    return None


def _cut(p: dict[str, np.ndarray], read: str, write: str, start: int, stop: int) -> dict[str, np.ndarray] | None:
    """Ranks `start` to `stop` of a pair of factors; None if there are fewer."""
    if p[read].shape[0] < stop:
        return None
    return {read: p[read][start:stop], write: p[write][:, start:stop]}


def _zero_beyond(p: dict[str, np.ndarray], read: str, write: str, rank: int) -> bool:
    """Whether the ranks from `rank` on add nothing."""
    return not (p[read][rank:].any() and p[write][:, rank:].any())
