"""A base model with a place for steering after every block, which adapters fill: `h + steer_up(act(steer_down(h)))`.

Both linears are zero in this folder, so that alone it computes the base model. An adapter over it (format `vllm`) is an
ordinary LoRA of these two, and of the projections: programs that serve several LoRAs at once then serve several
steerings at once. The linears have the base model's dtype, since these programs compute LoRA in the model's.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxsteer.io.files import Json
from jaxsteer.io.formats.format import ACTIVATIONS, Format, Given, Use, WriteOptions
from jaxsteer.io.formats.hf import dtype_of, refuse_dtype, rounded, save_loaded, with_dtype
from jaxsteer.io.formats.pieces import LowRank, activation_of, low_rank
from jaxsteer.io.formats.remote_code import KEY, describe_folder, extras_of, is_folder, read_folder, steering_of
from jaxsteer.io.formats.updates import refuse_lora
from jaxsteer.io.load import LoadedModel
from jaxsteer.io.steered import SteeredModel
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.families import FAMILIES, config_from_hf
from jaxsteer.models.families.table import Family
from jaxsteer.plans import method_name
from jaxsteer.steering import steering_shapes
from jaxsteer.types import Plan, Slot

KIND = "steerable"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks for which vLLM can reserve memory (max_lora_rank)."""


DOWN, UP = "steer_down.weight", "steer_up.weight"
"""The tensors of a block, [R, D] and [D, R]."""


def steerable_slot(rank: int, activation: str) -> Slot:
    """The place for steering that such a base has, as a slot."""
    return Slot("steering", low_rank(rank, activation), ("block",))


def post_block(plan: Plan) -> list[Slot]:
    """The slots of a plan that such a base has a place for."""
    return [slot for slot in plan if isinstance(slot.method, LowRank) and slot.sites == ("block",)]


def refuse_steering(plan: Plan, config: ModelConfig) -> list[str]:
    """Why a plan cannot be written as an adapter over a steerable base, a sentence for each slot."""
    reasons = []
    taken = post_block(plan)
    for slot in plan:
        what = f"slot {slot.name!r} ({method_name(slot.method)} @ {','.join(slot.sites)})"
        if slot in taken:
            reasons += [f"{what}: {reason}" for reason in _refuse_place(slot, taken)]
        elif "block" in slot.sites:
            reasons.append(
                f"{what}: a steerable base has a place after each block for linear or nonlinear steering. "
                f"{'Write it with --to hf-steered' if slot.positions.kind == 'all' else 'Use jaxsteer itself'}"
            )
    return reasons + refuse_lora(tuple(slot for slot in plan if "block" not in slot.sites), config, dora=False)


def _refuse_place(slot: Slot, taken: list[Slot]) -> list[str]:
    """Why a nonlinear slot after a block cannot have the place there."""
    if slot.positions.kind != "all":
        return [f"steers positions {slot.positions}; what is served steers all. Use jaxsteer itself"]
    for other in taken[: taken.index(slot)]:
        if other.shares_layer(slot):
            return [f"slot {other.name!r} has the place after one of its blocks. Write both with --to hf-steered"]
    activations = [activation_of(method_of(slot)), activation_of(method_of(taken[0]))]
    if activations[0] != activations[1]:
        return [
            f"its activation is {activations[0]}, that of slot {taken[0].name!r} is {activations[1]}, and a steerable "
            "base has one. Write both with --to hf-steered"
        ]
    return []


def method_of(slot: Slot) -> LowRank:
    """The method of a slot for which there is a place."""
    assert isinstance(slot.method, LowRank)
    return slot.method


def rank_for(plan: Plan, config: ModelConfig, rank: int | None) -> int:
    """The rank of the places: as asked for, else the plan's largest, rounded up to one of vLLM's."""
    largest = max(method_of(slot).rank for slot in post_block(plan))
    return rank or min(next((r for r in RANKS if r >= largest), largest), config.width)


def refuse(plan: Plan, family: Family, config: ModelConfig, options: WriteOptions) -> list[str]:
    """Why a plan has no place there, a sentence for each slot."""
    reasons = [*refuse_dtype(options), *refuse_steering(plan, config)]
    taken = post_block(plan)
    if not taken:
        return [
            *reasons,
            "the plan has no linear or nonlinear steering @ block, which would say the activation; write LoRA with "
            "--to peft",
        ]
    largest = max(method_of(slot).rank for slot in taken)
    limit = min(RANKS[-1], config.width)
    if options.rank is not None and not largest <= options.rank <= limit:
        reasons.append(
            f"--rank {options.rank}: the plan needs {largest}, and at most {limit} can be served; leave it out for "
            f"{rank_for(plan, config, None)}"
        )
    elif largest > limit:
        reasons.append(f"rank {largest}: vLLM serves at most {limit}. Write it with --to hf-steered")
    return reasons


def reduce(steered: SteeredModel, options: WriteOptions) -> SteeredModel:
    """The base model with zero steering in every place."""
    loaded = with_dtype(steered.loaded, options.dtype)
    config = loaded.config
    activation = activation_of(method_of(post_block(steered.plan)[0]))
    slot = steerable_slot(rank_for(steered.plan, config, options.rank), activation)
    shapes = steering_shapes((slot,), config, dtype_of(loaded))
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    lost = [*steered.lost, *rounded(steered, options.dtype)]
    return replace(steered, loaded=loaded, plan=(slot,), steering=zero, lost=lost)


def _name_of(number: int, param: str) -> str:
    return {"D": DOWN, "U": UP}[param]


def write(reduced: SteeredModel, folder: Path, options: WriteOptions) -> None:
    """Write the folder."""
    (slot,) = reduced.plan
    about = {"rank": method_of(slot).rank, "activation": activation_of(method_of(slot))}
    save_loaded(folder, reduced.loaded, extras_of(KIND, reduced, about, _name_of))


class Places(NamedTuple):
    """What a steerable base has a place for.

    family      of the base model
    config      its config
    rank        of the steering
    activation  between its two linears
    """

    family: Family
    config: ModelConfig
    rank: int
    activation: str


def places_in(path: Path) -> Places:
    """Read what a steerable base has a place for, without its weights.

    Raises:
        ValueError: the folder is not a steerable base, or damaged.
    """
    _, raw, about = describe_folder(path, KIND)
    return _places(about, *config_from_hf(raw, str(path / "config.json")), path)


def _places(about: Mapping[str, Json], family: Family, config: ModelConfig, path: Path) -> Places:
    """The checked content of the config's field about steering."""
    rank, activation = about.get("rank"), about.get("activation")
    where = f"{path / 'config.json'}: {KEY}"
    if type(rank) is not int or not 1 <= rank <= config.width:
        raise ValueError(f"{where} says rank {reprlib.repr(rank)}; expected an integer from 1 to {config.width}")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(
            f"{where} says activation {reprlib.repr(activation)}; expected one of {', '.join(ACTIVATIONS)}"
        )
    return Places(family, config, rank, activation)


def read(path: Path, loaded: LoadedModel | None, given: Given) -> SteeredModel:
    """The base model in a folder, with its places as a slot."""
    parts = read_folder(path, KIND)
    family = FAMILIES[parts.loaded.family]
    places = _places(parts.about, family, parts.loaded.config, path)
    plan = (steerable_slot(places.rank, places.activation),)
    return SteeredModel(parts.loaded, plan, steering_of(parts, plan, _name_of, str(path)), str(path))


FORMAT = Format(
    name="hf-steerable",
    holds="a base model with a place for low-rank steering after every block, for the adapters of vllm",
    programs="transformers, vLLM",
    recognises=lambda path: is_folder(path, KIND),
    read=read,
    whole=True,
    unsteered=True,
    refuse=refuse,
    reduce=reduce,
    write=write,
    options=("dtype", "rank"),
    verify="transformers",
    use=Use(
        "transformers",
        "",
        "vllm serve FOLDER --trust-remote-code --enable-lora --max-lora-rank 16 --max-loras 4",
        "bash",
        tags=("custom_code", "vllm"),
        needs="Alone it is the base model: adapters over it are the steering. `--max-lora-rank` is at least the `r`"
        " in their adapter_config.json.",
    ),
)
