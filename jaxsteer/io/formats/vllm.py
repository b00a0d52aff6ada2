"""Adapters over a steerable base (`hf-steerable`): LoRA folders, of which vLLM serves another one to each request.

A block's steering h + α U act(D h) is LoRA of its two zero linears: of steer_down with A = D and B = I, of steer_up
with A = I and B = U at the scale α. So the factors stand in the files as they were trained, beside LoRA of projections.
The activation is the base's; the weights' metadata repeat it, since an adapter's config has no word for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxsteer.io.formats import peft
from jaxsteer.io.formats.format import ACTIVATIONS, Format, Given, Use, WriteOptions
from jaxsteer.io.formats.hf_steerable import (
    RANKS,
    method_of,
    places_in,
    post_block,
    refuse_steering,
)
from jaxsteer.io.formats.modules import has_conv1d
from jaxsteer.io.formats.peft_config import CONFIG, read_config
from jaxsteer.io.formats.pieces import activation_of, base_needed, low_rank
from jaxsteer.io.formats.remote_code import blocks_of, tensors_of
from jaxsteer.io.formats.updates import Update, alpha_for, plan_of, updates_of
from jaxsteer.io.identity import differences
from jaxsteer.io.load import LoadedModel
from jaxsteer.io.safetensors_file import open_safetensors
from jaxsteer.io.sample import compare_samples, sample
from jaxsteer.io.steered import SteeredModel
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.families import FAMILIES
from jaxsteer.models.families.table import Family
from jaxsteer.types import Plan, Slot, Steering

DOWN, UP = "steer_down", "steer_up"
"""The two linears of a block, [R, D] and [D, R]."""

_ACTIVATION = "steering_activation"
"""In the metadata of the weights."""

Factors = tuple[np.ndarray, np.ndarray, float]
"""One block's D [R, D], U [D, R] and alpha."""


def max_lora_rank(ranks: Iterable[int]) -> int | None:
    """The smallest max_lora_rank with which vLLM serves updates of these ranks; None if there is none."""
    largest = max(ranks)
    return next((allowed for allowed in RANKS if allowed >= largest), None)


def refuse(plan: Plan, family: Family, config: ModelConfig, options: WriteOptions) -> list[str]:
    """Why a plan is no adapter over the base, a sentence each."""
    reasons = []
    if has_conv1d(family, config):
        reasons.append(
            "vLLM cannot load layers stored as Conv1D (GPT-2) with steering. Use transformers: --to hf-steered, --to hf"
        )
    if not plan:
        reasons.append("the plan has no slots: the weights hold everything; write the model (--to hf)")
    return [*reasons, *refuse_steering(plan, config), *_refuse_over(plan, family, config, options.over)]


def _refuse_over(plan: Plan, family: Family, config: ModelConfig, over: Path | None) -> list[str]:
    """Why a steerable base has no place for the plan, a sentence each."""
    if over is None:
        return ["--over FOLDER is missing: the steerable base that this is for, written once with --to hf-steerable"]
    try:
        base = places_in(over)
    except ValueError as error:
        return [f"--over: no steerable base ({error}); write one with --to hf-steerable"]
    if base.family.name != family.name:
        return [
            f"--over {over}: of a {base.family.name}, and this is a {family.name}; write one with --to hf-steerable"
        ]
    if unlike := differences(config, base.config):
        return [f"--over {over}: of another model ({'; '.join(unlike)}); write one with --to hf-steerable"]
    reasons = []
    for slot in post_block(plan):
        rank, activation = method_of(slot).rank, activation_of(method_of(slot))
        if rank > base.rank:
            reasons.append(
                f"slot {slot.name!r}: rank {rank}, and {over} has places of rank {base.rank}; write a wider base with "
                f"--to hf-steerable --rank {rank}"
            )
        if activation != base.activation:
            reasons.append(
                f"slot {slot.name!r}: activation {activation}, and that of {over} is {base.activation}; write "
                "another base with --to hf-steerable, or this model alone with --to hf-steered"
            )
    return reasons


def _check_weights(loaded: LoadedModel, over: Path) -> None:
    """Refuse a steerable base whose weights are another model's.

    Raises:
        ValueError: they are.
    """
    if loaded.sample is None:
        return
    family = FAMILIES[loaded.family]
    found = compare_samples(sample(tensors_of(over, family)[0], "hf", family, loaded.config), loaded.sample)
    if found.verdict == "another":
        raise ValueError(
            f"--over {over}: of another model than {loaded.name}: {found.reason}. Write one with --to hf-steerable"
        )


def reduce(steered: SteeredModel, options: WriteOptions) -> SteeredModel:
    """LoRA of the projections, and steering in the terms of the base."""
    assert options.over is not None
    _check_weights(steered.loaded, options.over)
    placed = post_block(steered.plan)
    rest = tuple(slot for slot in steered.plan if slot not in placed)
    lora = peft.reduce(replace(steered, plan=rest), options)
    for name, update in peft.to_stored(updates_of(lora), steered.loaded).items():
        if max_lora_rank([update.rank]) is None:
            raise ValueError(f"{name}: its updates have rank {update.rank}; vLLM serves {RANKS[-1]}: merge (--to hf)")
    factors: dict[int, Factors] = {}
    for slot in placed:
        leaves = {name: np.asarray(leaf) for name, leaf in steered.steering[slot.name]["block"].items()}
        for at, layer in enumerate(slot.active_layers(steered.loaded.config.layers)):
            factors[layer] = leaves["D"][at], leaves["U"][at], _as_read(slot)
    activation = activation_of(method_of(placed[0])) if placed else ""
    plan, steering = _slots(factors, activation, steered.loaded.config)
    return replace(lora, plan=(*lora.plan, *plan), steering=lora.steering | steering)


def _as_read(slot: Slot) -> float:
    """The α of a slot as the quotient that is stored."""
    return alpha_for(method_of(slot).alpha, method_of(slot).rank) / method_of(slot).rank


def _slots(factors: Mapping[int, Factors], activation: str, config: ModelConfig) -> tuple[Plan, Steering]:
    """The factors of blocks as slots, one for each rank and α: "steering", "steering_2" and so on."""
    groups: dict[tuple[int, float], list[int]] = {}
    for layer, (down, _, alpha) in sorted(factors.items()):
        groups.setdefault((down.shape[0], alpha), []).append(layer)
    slots: list[Slot] = []
    steering: Steering = {}
    for number, ((rank, alpha), layers) in enumerate(groups.items(), 1):
        name = "steering" if number == 1 else f"steering_{number}"
        chosen = None if layers == list(range(config.layers)) else tuple(layers)
        slots.append(Slot(name, low_rank(rank, activation, alpha), ("block",), chosen))
        stacked = {param: jnp.stack([factors[layer][part] for layer in layers]) for part, param in enumerate("DU")}
        steering[name] = {"block": stacked}
    return tuple(slots), steering


def write(reduced: SteeredModel, folder: Path, options: WriteOptions) -> None:
    """Write the two files."""
    assert options.over is not None
    loaded, rank = reduced.loaded, places_in(options.over).rank
    placed = post_block(reduced.plan)
    rest = replace(reduced, plan=tuple(slot for slot in reduced.plan if slot not in placed))
    updates = peft.to_stored(updates_of(rest), loaded)
    for slot in placed:
        leaves = {name: np.asarray(leaf) for name, leaf in reduced.steering[slot.name]["block"].items()}
        identity = np.eye(rank, method_of(slot).rank, dtype=np.float32)
        for at, layer in enumerate(slot.active_layers(loaded.config.layers)):
            down, up = _named(loaded, layer)
            updates[down] = Update(leaves["D"][at], identity, 1.0)
            updates[up] = Update(identity.T, leaves["U"][at], method_of(slot).alpha)
    metadata = {_ACTIVATION: activation_of(method_of(placed[0]))} if placed else {}
    peft.write_peft(folder, updates, _shapes(loaded, rank), {}, metadata)


def _named(loaded: LoadedModel, layer: int) -> tuple[str, str]:
    """The names of a block's two linears."""
    block = f"{blocks_of(FAMILIES[loaded.family])}.{layer}"
    return f"{block}.{DOWN}", f"{block}.{UP}"


def _shapes(loaded: LoadedModel, rank: int) -> dict[str, tuple[int, int]]:
    """Every linear layer of the steerable base's blocks: numbers of inputs and outputs."""
    config = loaded.config
    layers = peft.layers_of(FAMILIES[loaded.family], config)
    shapes = {name: module.shape(config) for name, (module, _) in layers.items()}
    for layer in range(config.layers):
        down, up = _named(loaded, layer)
        shapes |= {down: (config.width, rank), up: (rank, config.width)}
    return shapes


def recognises(path: Path) -> bool:
    """Whether a LoRA folder updates the linears of a steerable base."""
    try:
        return any(f".{DOWN}." in name for name in open_safetensors(path / peft.WEIGHTS)[0])
    except (ValueError, OSError):
        return False


def read(path: Path, loaded: LoadedModel | None, given: Given) -> SteeredModel:
    """The LoRA and the steering of a folder."""
    config = read_config(path / CONFIG)
    loaded = base_needed(path, loaded, config.raw.get("base_model_name_or_path"))
    if config.dora or config.pissa:
        raise ValueError(
            f"{path / CONFIG}: DoRA and unconverted PiSSA are nothing that vLLM serves; merge them with peft"
        )
    tensors, metadata = open_safetensors(path / peft.WEIGHTS)
    widths = {
        tensor.shape[0] for name, tensor in tensors.items() if name.endswith(f".{DOWN}.lora_B.weight") and tensor.shape
    }
    if len(widths) > 1 or not all(1 <= width <= loaded.config.width for width in widths):
        raise ValueError(
            f"{path}: {DOWN} has outputs {sorted(widths)}; expected one rank, at most {loaded.config.width}"
        )
    updates = peft.read_peft(path, config, _shapes(loaded, max(widths, default=1)))
    factors: dict[int, Factors] = {}
    for layer in range(loaded.config.layers):
        down, up = (updates.pop(name, None) for name in _named(loaded, layer))
        if (down is None) != (up is None):
            raise ValueError(f"{path}: block {layer} has only one of {DOWN} and {UP}; copy the folder again")
        if down is not None and up is not None:
            factors[layer] = _factors(down, up)
    plan, steering = plan_of(peft.from_stored(updates, loaded), loaded.config)
    placed, more = _slots(factors, _activation(metadata, given, path) if factors else "", loaded.config)
    return SteeredModel(loaded, (*plan, *placed), steering | more)


def _factors(down: Update, up: Update) -> Factors:
    """One block's D, U and α: as they stand in the file beside identities, else those of the products, α = 1."""
    if down.scale == 1 and _is_identity(down.b) and _is_identity(up.a) and down.rank == up.rank:
        return down.a, up.b, up.scale
    product = lambda update: np.float32(update.scale) * (update.b @ update.a)
    return product(down), product(up), 1.0


def _is_identity(matrix: np.ndarray) -> bool:
    return np.array_equal(matrix, np.eye(*matrix.shape, dtype=matrix.dtype))


def _activation(metadata: Mapping[str, str], given: Given, path: Path) -> str:
    """The activation of the base that an adapter is for.

    Raises:
        ValueError: it is not known, or unknown.
    """
    said = metadata.get(_ACTIVATION)
    if said and given.activation and said != given.activation:
        raise ValueError(
            f"{path}: is for a base with activation {said}, not {given.activation}; leave --activation out"
        )
    activation = said or given.activation
    if not activation:
        raise ValueError(f"{path}: does not say the activation of its steerable base; give --activation")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{path}: activation {activation[:100]!r}; expected one of {', '.join(ACTIVATIONS)}")
    return activation


FORMAT = Format(
    name="vllm",
    holds="post-block linear or nonlinear steering and LoRA, over a steerable base, a different one for each request",
    programs="vLLM, PEFT",
    recognises=recognises,
    read=read,
    refuse=refuse,
    reduce=reduce,
    write=write,
    options=("over",),
    asks=("activation",),
    verify="vllm",
    use=Use(
        "peft",
        "adapter",
        "vllm serve STEERABLE --trust-remote-code --enable-lora --max-lora-rank 16 --lora-modules steered=FOLDER",
        "bash",
        tags=("lora", "vllm"),
        needs="`STEERABLE` is the folder of the steerable base that it was written over. `--max-lora-rank` is at "
        "least the `r` in adapter_config.json. Requests ask for the model `steered`.",
    ),
)
