"""Sparse autoencoders of SAELens: one row of the decoder, times a strength, as a fixed vector.

A folder with sae_weights.safetensors and cfg.json, which names the place of the model that was decomposed.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from jaxsteer.interventions import FixedVector
from jaxsteer.io.files import Json, read_json
from jaxsteer.io.formats.format import Format, Given
from jaxsteer.io.formats.pieces import Piece, ask, gather, matrix_shape
from jaxsteer.io.load import LoadedModel
from jaxsteer.io.safetensors_file import FLOATS, open_safetensors
from jaxsteer.io.steered import SteeredModel
from jaxsteer.models.config import ModelConfig

WEIGHTS, SETTINGS, DECODER = "sae_weights.safetensors", "cfg.json", "W_dec"
HOOKS: dict[str, tuple[str, int, bool]] = {
    r"blocks\.(\d{1,6})\.hook_resid_post": ("block", 0, False),
    r"blocks\.(\d{1,6})\.hook_resid_pre": ("block", -1, False),
    r"blocks\.(\d{1,6})\.hook_mlp_out": ("mlp", 0, False),
    r"blocks\.(\d{1,6})\.hook_attn_out": ("attn", 0, False),
    r"(?:model\.layers|transformer\.h)\.(\d{1,6})": ("block", 0, False),
    r"(?:model\.layers|transformer\.h)\.(\d{1,6})\.mlp": ("mlp", 0, True),
    r"(?:model\.layers|transformer\.h)\.(\d{1,6})\.(?:self_attn|attn)": ("attn", 0, True),
}
"""Hooks of TransformerLens and modules of transformers: (our site, layers further on, whether before a post-norm)."""
ARCHITECTURES = (
    "standard",
    "gated",
    "jumprelu",
    "topk",
    "batchtopk",
    "matryoshka_batchtopk",
    "matching_pursuit",
    "abstopk",
)
"""Autoencoders whose decoder writes what their encoder reads; transcoders write elsewhere."""
PER_TOKEN = ("layer_norm", "constant_norm_rescale", "covariance_whitening")
"""Normalisations of the activations after which no fixed vector is a row of the decoder."""
NEEDS = {"feature": "row of the decoder, from 0", "strength": "factor of the row"}


def recognises(path: Path) -> bool:
    """Whether a folder holds an autoencoder by the names of SAELens."""
    return (path / WEIGHTS).is_file()


def read(path: Path, loaded: LoadedModel | None, given: Given) -> SteeredModel:
    """Read a row of the decoder.

    Raises:
        ValueError: damaged files; a place that jaxsteer does not steer; a feature, strength or base that is not given.
    """
    config = read_json(path / SETTINGS)
    _check_kind(path / SETTINGS, config)
    model = ask(path, "SAELens", loaded, given, NEEDS)
    site, layer = _place(path / SETTINGS, config, model.config)
    row = _row(path / WEIGHTS, config, given, model)
    with np.errstate(over="ignore", invalid="ignore"):
        shift = (np.float64(given.strength or 0) * row).astype(np.float32)
    steered = gather(path, model, [Piece(FixedVector(), site, layer, {"v": shift})])
    if config.get("normalize_activations") in ("expected_average_only_in", True):
        lost = (
            "the autoencoder reads activations divided by a factor that its files do not hold: the strength is in "
            "units of the model's own activations"
        )
        steered = replace(steered, lost=(lost,))
    return steered


def _metadata(path: Path, config: Mapping[str, Json]) -> Mapping[str, Json]:
    """Where a setting of the language model is: under "metadata" since SAELens 6."""
    metadata = config.get("metadata")
    if metadata is not None and not isinstance(metadata, dict):
        raise ValueError(f"{path}: metadata is {reprlib.repr(metadata)}, expected an object")
    return {**config, **(metadata or {})}


def _check_kind(path: Path, config: Mapping[str, Json]) -> None:
    """Refuse what is no autoencoder of one place, and normalisations that no fixed vector undoes."""
    kind = config.get("architecture", "standard")
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"{path}: architecture is {reprlib.repr(kind)}; the decoders of {', '.join(ARCHITECTURES)} are read"
        )
    if (norm := config.get("normalize_activations")) in PER_TOKEN:
        raise ValueError(
            f"{path}: normalises the activations of each token ({norm}), so that a row of its decoder has another size "
            "for each token and is no fixed vector. Use an autoencoder without normalize_activations"
        )
    if norm not in (None, "none", "expected_average_only_in", False, True):
        raise ValueError(f"{path}: normalize_activations is {reprlib.repr(norm)}, which jaxsteer does not know")
    if (shape := config.get("reshape_activations", "none")) not in (None, "none"):
        raise ValueError(
            f"{path}: reshapes activations ({reprlib.repr(shape)}), as of single heads; these are not read"
        )


def _place(path: Path, config: Mapping[str, Json], model: ModelConfig) -> tuple[str, int]:
    """Our site and layer for the place that was decomposed."""
    settings = _metadata(path, config)
    hook = settings.get("hook_name", settings.get("hook_point"))
    for pattern, (site, further, before_norm) in HOOKS.items():
        if not isinstance(hook, str) or not (match := re.fullmatch(pattern, hook)):
            continue
        layer = int(match[1]) + further
        if layer < 0:
            raise ValueError(
                f"{path}: {hook} is the embedding, before the first block, which jaxsteer does not steer; use an "
                "autoencoder of a block's output"
            )
        if before_norm and model.post_norm:
            raise ValueError(f"{path}: {hook} is before the norm that this family has there; jaxsteer steers behind it")
        return site, layer
    raise ValueError(
        f"{path}: hook_name is {reprlib.repr(hook)}; those that are read are blocks.I.hook_resid_post, hook_resid_pre, "
        "hook_mlp_out and hook_attn_out, and model.layers.I (transformer.h.I) with .mlp or .self_attn"
    )


def _row(path: Path, config: Mapping[str, Json], given: Given, model: LoadedModel) -> np.ndarray:
    """The row, fp32; nothing else of the decoder is read."""
    tensors = open_safetensors(path)[0]
    if DECODER not in tensors:
        raise ValueError(f"{path}: has no {DECODER}, only {', '.join(list(tensors)[:20]) or 'nothing'}")
    tensor = tensors[DECODER]
    rows, width = matrix_shape(path, DECODER, tensor)
    if width != model.config.width:
        raise ValueError(f"{path}: {DECODER} is {width} wide, {model.name} {model.config.width}: another base model?")
    for name, found in (("d_sae", rows), ("d_in", width)):
        if name in config and config[name] != found:
            raise ValueError(f"{path}: {name} is {reprlib.repr(config[name])} in {SETTINGS}, {found} by {DECODER}")
    if tensor.form not in FLOATS:
        raise ValueError(f"{path}: {DECODER} holds {tensor.form} values; expected {', '.join(FLOATS)}")
    if type(given.feature) is not int or not 0 <= given.feature < rows:
        raise ValueError(f"{path}: --feature is {given.feature!r}; the autoencoder has features 0 to {rows - 1}")
    span = slice(given.feature, given.feature + 1)
    with np.errstate(over="ignore"):
        return tensor.read((span, slice(0, width)))[0].astype(np.float32)


FORMAT = Format(
    name="saelens",
    holds="a feature of a sparse autoencoder, as a fixed vector",
    programs="SAELens",
    recognises=recognises,
    read=read,
    asks=tuple(NEEDS),
)
