"""A whole model as transformers saves it, with the steering merged into its weights."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.folding import affine_parts, biases_needed, fold_all, unfoldable
from jaxsteer.io.files import read_json
from jaxsteer.io.formats.format import Format, Given, Use, WriteOptions
from jaxsteer.io.hf_folder import NO_EXTRAS, Extras, save_hf
from jaxsteer.io.identity import fingerprint
from jaxsteer.io.load import STEERED_TYPE, LoadedModel, load_model
from jaxsteer.io.steered import SteeredModel
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.families.table import Family
from jaxsteer.models.quantise import is_quantised
from jaxsteer.models.transformer import init_base
from jaxsteer.plans import method_name
from jaxsteer.steering import steering_shapes
from jaxsteer.types import Plan, PyTree, Slot, Steering

DTYPES = ("float32", "bfloat16", "float16")


def refuse_dtype(options: WriteOptions) -> list[str]:
    """Why weights cannot be written in the dtype that is asked for."""
    if options.dtype in (None, *DTYPES):
        return []
    return [f"--dtype {options.dtype}: these folders hold {', '.join(DTYPES)}; quantised ones are --to gguf"]


def dtype_of(loaded: LoadedModel) -> np.dtype:
    """The dtype of a model's weights."""
    return np.dtype(loaded.base["embed"]["embedding"].dtype)


def cast(base: PyTree, dtype: str | np.dtype | None) -> PyTree:
    """The base tree in this dtype; None = as it is."""
    return base if dtype is None else jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(dtype), base)


def with_dtype(loaded: LoadedModel, dtype: str | None) -> LoadedModel:
    """The model with its weights in this dtype; None = as they are."""
    return replace(loaded, base=cast(loaded.base, dtype))


def rounded(steered: SteeredModel, dtype: str | np.dtype | None) -> list[str]:
    """What a dtype takes from the weights, a sentence; none where it holds them."""
    own = dtype_of(steered.loaded)
    old, new = jnp.finfo(own), jnp.finfo(own if dtype is None else dtype)
    if new.nmant >= old.nmant and new.nexp >= old.nexp:
        return []
    return [f"the weights were {own}, and are rounded to {np.dtype(dtype)}"]


def save_loaded(folder: Path, loaded: LoadedModel, extras: Extras = NO_EXTRAS) -> None:
    """Write a model as a folder, with its tokenizer and its settings of generation."""
    save_hf(
        folder,
        loaded.config,
        loaded.base,
        loaded.family,
        loaded.tokenizer,
        generation=loaded.generation,
        extras=extras,
    )


def refuse_merging(plan: Plan, family: Family, config: ModelConfig, biases: Collection[str]) -> list[str]:
    """Why a family's weights cannot compute what these slots compute, a sentence for each, with what can.

    Args:
        plan, family, config: of the model.
        biases: flags of the config that a format can set: "attn_bias", "mlp_bias".
    """
    reasons = {slot.name: reason for slot in plan if (reason := unfoldable(slot, config))}
    rest = tuple(slot for slot in plan if slot.name not in reasons)
    for name, needing in biases_needed(rest, config).items():
        flag = f"{name.partition('.')[0]}_bias"
        if not getattr(config, flag) and flag not in biases:
            reasons[needing] = f"slot {needing!r}: a shift needs a bias of {name}, {family.name} models have none"
    for slot in _left(tuple(slot for slot in rest if slot.name not in reasons), config):
        reasons[slot.name] = (
            f"slot {slot.name!r} ({method_name(slot.method)}): it depends on kernels that other slots are merged into"
        )
    return [f"{reasons[slot.name]}. {_nearest(slot, config)}" for slot in plan if slot.name in reasons]


def _left(plan: Plan, config: ModelConfig) -> Plan:
    """The slots that `fold_all` leaves, found without computing anything."""
    left: list[Slot] = []

    def fold(base: PyTree, steering: Steering) -> None:
        left.extend(fold_all(config, plan, base, steering).plan)

    base = jax.eval_shape(lambda: init_base(config, jax.random.key(0)))
    jax.eval_shape(fold, base, steering_shapes(plan, config))
    return tuple(left)


def _nearest(slot: Slot, config: ModelConfig) -> str:
    """What can hold a slot that is not merged."""
    if slot.positions.kind != "all" or slot.method.kind == "weight":
        return "Use jaxsteer itself"
    if slot.sites == ("block",):
        parts = affine_parts(slot, config)
        is_vector = parts is not None and parts.read is None and parts.scale is None
        return "Write it as it is with --to hf-steered" + (" or --to gguf-control" if is_vector else "")
    return "Use jaxsteer itself, or train steering @ block, which --to hf-steered holds"


def merged(steered: SteeredModel, options: WriteOptions) -> SteeredModel:
    """The model with every slot merged into its weights, computed in fp32 or wider and rounded once.

    Raises:
        ValueError: an int8 base, or a slot that cannot be merged.
    """
    loaded, dtype = steered.loaded, options.dtype or dtype_of(steered.loaded)
    if is_quantised(loaded.base):
        raise ValueError(f"{loaded.name}: the base is in int8, which these folders do not hold; load its float weights")
    wide = cast(loaded.base, np.promote_types(dtype_of(loaded), np.float32))
    folded = fold_all(loaded.config, steered.plan, wide, steered.steering)
    if folded.plan:
        raise ValueError(f"slot {folded.plan[0].name!r}: it cannot be merged into the weights")
    loaded = replace(
        loaded, config=folded.config, base=cast(folded.base, dtype), fingerprint=fingerprint(folded.config), sample=None
    )
    return replace(steered, loaded=loaded, plan=(), steering={}, lost=[*steered.lost, *rounded(steered, dtype)])


def recognises(path: Path) -> bool:
    """A folder with a config.json and safetensors of a family known here."""
    try:
        raw = read_json(path / "config.json")
    except (ValueError, OSError):
        return False
    weights = any((path / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json"))
    return weights and not str(raw.get("model_type")).startswith(STEERED_TYPE)


def read(path: Path, loaded: LoadedModel | None, given: Given) -> SteeredModel:
    """The model in a folder."""
    return SteeredModel(load_model(path), source=str(path))


FORMAT = Format(
    name="hf",
    holds="a whole model; LoRA and affine steering merged into its weights",
    programs="transformers, vLLM, SGLang and everything else that reads Hugging Face folders",
    recognises=recognises,
    read=read,
    whole=True,
    refuse=lambda plan, family, config, options: [
        *refuse_dtype(options),
        *refuse_merging(plan, family, config, family.fields),
    ],
    reduce=merged,
    write=lambda reduced, folder, options: save_loaded(folder, reduced.loaded),
    options=("dtype",),
    verify="transformers",
    use=Use(
        "transformers",
        "finetune",
        """\
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto")""",
    ),
)
