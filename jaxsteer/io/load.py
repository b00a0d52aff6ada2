"""Load a pretrained model: config, weights and tokenizer, together or apart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxsteer.io import source as sources
from jaxsteer.io.files import read_json
from jaxsteer.io.gguf_config import config_from_gguf, parameters_of
from jaxsteer.io.gguf_file import open_gguf
from jaxsteer.io.identity import fingerprint
from jaxsteer.io.safetensors_file import open_safetensors
from jaxsteer.io.stored import Place, Progress, Stored, read_base
from jaxsteer.io.tokenizer import has_tokenizer, stop_tokens_from_gguf, tokenizer_from_folder, tokenizer_from_gguf
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.families import Family, config_from_hf
from jaxsteer.types import PyTree


@dataclass(frozen=True)
class LoadedModel:
    """A pretrained model.

    config       its features
    base         its weights, in the layout of `jaxsteer.models.transformer.init_base`
    tokenizer    a `transformers.PreTrainedTokenizerFast`; None where the source has none
    name         the hub's id, the folder's name or the file's, for people
    fingerprint  of the config, see `fingerprint`
    family       our name of its family, see `jaxsteer.models.families.FAMILIES`
    stop_tokens  ids that end a reply
    """

    config: ModelConfig
    base: PyTree
    tokenizer: Any
    name: str
    fingerprint: str
    family: str
    stop_tokens: tuple[int, ...]


def load_model(
    source: str | Path,
    *,
    dtype: Any = jnp.float32,
    progress: Progress | None = None,
    place: Place | None = None,
    quantised: bool = False,
    tokenizer: str | Path | None = None,
) -> LoadedModel:
    """Load config, weights and tokenizer.

    Args:
        source: a folder with config.json and safetensors, a .gguf file, or a hub id ("owner/name").
        dtype: of the weights; quantised ones are dequantised to it.
        progress: called with (bytes read, bytes that this process reads in all) after every tensor or part of one.
        place: (path, shape) -> the sharding of a stacked leaf. Each process reads its own shards only, so that host
            memory stays near what its devices hold. By default all is on one device.
        quantised: the projections of the blocks in int8, see `jaxsteer.models.quantise`.
        tokenizer: where it comes from, if not from `source`: a GGUF file may have one of a kind that is not known.

    Raises:
        ValueError: the source does not exist, is damaged, or is not a model that can be computed faithfully.
    """
    path = sources.locate(source, (*sources.CONFIG, *sources.TOKENIZER, *sources.WEIGHTS))
    family, config = _read_config(path)
    own = path if path.is_file() or has_tokenizer(path) else None
    words = None if (given := tokenizer or own) is None else load_tokenizer(given)
    base = _load_base(path, family, config, dtype, progress, place, quantised)
    stops = _stop_tokens(path, words)
    name = sources.name_of(source, path)
    return LoadedModel(config, base, words, name, fingerprint(config), family.name, stops)


def load_base(
    source: str | Path,
    *,
    dtype: Any = jnp.float32,
    progress: Progress | None = None,
    place: Place | None = None,
    quantised: bool = False,
) -> PyTree:
    """Load the weights alone; see `load_model`."""
    path = sources.locate(source, (*sources.CONFIG, *sources.WEIGHTS))
    return _load_base(path, *_read_config(path), dtype, progress, place, quantised)


def load_config(source: str | Path) -> ModelConfig:
    """Load the config alone, without reading weights; see `load_model`."""
    return _read_config(sources.locate(source, sources.CONFIG))[1]


def load_tokenizer(source: str | Path) -> Any:
    """Load the tokenizer alone; see `load_model`.

    Raises:
        ValueError: the source has no tokenizer, or one of a kind that is not known.
    """
    path = sources.locate(source, (*sources.CONFIG, *sources.TOKENIZER))
    return tokenizer_from_gguf(open_gguf(path).metadata, str(path)) if path.is_file() else tokenizer_from_folder(path)


def _read_config(path: Path) -> tuple[Family, ModelConfig]:
    if path.is_file():
        return config_from_gguf(open_gguf(path))
    file = path / "config.json"
    return config_from_hf(read_json(file), str(file))


def _load_base(
    path: Path,
    family: Family,
    config: ModelConfig,
    dtype: Any,
    progress: Progress | None,
    place: Place | None,
    quantised: bool,
) -> PyTree:
    layout = "gguf" if path.is_file() else "hf"
    stored = parameters_of(open_gguf(path)) if path.is_file() else _open_folder(path)
    return read_base(
        stored, layout, family, config, str(path), dtype=dtype, progress=progress, place=place, quantised=quantised
    )


def _open_folder(folder: Path) -> dict[str, Stored]:
    """The tensors of a folder's model.safetensors, or of the shards that its index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return open_safetensors(single)[0]
    if not index.is_file():
        raise ValueError(
            f"{folder}: no model.safetensors and no model.safetensors.index.json. If the weights are .bin or "
            ".pth, convert them to safetensors first"
        )
    said = read_json(index).get("weight_map")
    if not isinstance(said, dict) or not all(isinstance(name, str) for name in said.values()):
        raise ValueError(f"{index}: expected a weight_map from tensors to files")
    stored: dict[str, Stored] = {}
    for name in sorted(set(said.values())):
        if Path(name).name != name:
            raise ValueError(f"{index}: {name!r} is outside the folder; shards must lie beside their index")
        for tensor, found in open_safetensors(folder / name)[0].items():
            if said.get(tensor) != name:
                raise ValueError(f"{folder / name}: holds {tensor}, which the index does not place there")
            stored[tensor] = found
    if lost := sorted(set(said) - set(stored)):
        raise ValueError(f"{index}: the shards do not hold {', '.join(lost)}, which the index promises")
    return stored


def _stop_tokens(path: Path, tokenizer: Any) -> tuple[int, ...]:
    """What a GGUF file says, or generation_config.json, or config.json, or the tokenizer."""
    if path.is_file() and (named := stop_tokens_from_gguf(open_gguf(path).metadata)):
        return named
    for name in ("generation_config.json", "config.json"):
        if (path / name).is_file():
            said = read_json(path / name).get("eos_token_id")
            ids = said if isinstance(said, list) else [] if said is None else [said]
            if any(type(i) is not int for i in ids):
                raise ValueError(f"{path / name}: eos_token_id is {said!r}; expected an id or a list of them")
            if ids:
                return tuple(dict.fromkeys(ids))
    eos = getattr(tokenizer, "eos_token_id", None)
    return () if eos is None else (eos,)
