"""Export to a Hugging Face folder, with the table of the model's family read backwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np

from jaxsteer.io.files import Json, read_json, write_json, write_text
from jaxsteer.io.safetensors_file import ToWrite, write_safetensors
from jaxsteer.io.stored import names_of, size, transform_of
from jaxsteer.io.token_ids import ROLES, shortest
from jaxsteer.io.tokenizer import Tokenizer
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.families import FAMILIES, config_to_hf
from jaxsteer.models.families.table import Row
from jaxsteer.models.quantise import is_quantised
from jaxsteer.types import Array, PyTree


@dataclass(frozen=True)
class Extras:
    """What a folder holds besides a model of its family.

    tensors  in a second shard, beside the base model's
    fields   of config.json, besides the family's or instead of them
    files    more text files by name
    """

    tensors: Sequence[ToWrite] = ()
    fields: Mapping[str, Json] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)


NO_EXTRAS = Extras()


def save_hf(
    folder: str | Path,
    config: ModelConfig,
    base: PyTree,
    family: str,
    tokenizer: Tokenizer | None = None,
    stop_tokens: Sequence[int] = (),
    generation: Mapping[str, Json] | None = None,
    *,
    extras: Extras = NO_EXTRAS,
) -> None:
    """Write a folder from which transformers and `load_model` read this model, bit for bit.

    Of a `LoadedModel` give `config`, `base`, `family`, `tokenizer` and `generation`: its stop tokens are among those.

    Each file is written atomically and config.json comes last, so a folder that has one is complete. Weights keep their
    dtype.

    Args:
        folder: the output folder, created if it does not exist.
        config: the model's features.
        base: its weights, in the layout of `init_base`.
        family: our name of its family, see `jaxsteer.models.families.FAMILIES`.
        tokenizer: a transformers tokenizer to save in the folder.
        stop_tokens: ids that end a reply; by default those of `generation`, else the tokenizer's eos.
        generation: settings for generation_config.json, as in `LoadedModel`. Its ids of special tokens are written to
            config.json too; those that it does not give are the tokenizer's.
        extras: what the folder holds besides the model.

    Raises:
        ValueError: an unknown family; an int8 base; leaves that are missing, unknown or of the wrong shape, all named.
    """
    tensors = tensors_of(config, base, family, "hf", str(folder))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_shards(folder, [tensors, extras.tensors] if extras.tensors else [tensors])
    settings: dict[str, Json] = {}
    if tokenizer is not None:
        _save_tokenizer(folder, tokenizer)
        settings = {role: i for role in ROLES if (i := getattr(tokenizer, role)) is not None}
    settings |= generation or {}
    if stop_tokens:
        settings["eos_token_id"] = shortest(stop_tokens)
    write_json(folder / "generation_config.json", settings)
    for name, text in extras.files.items():
        write_text(folder / name, text)
    # Null, not absent: transformers has ids of its own for some families.
    ids = {role: settings.get(role) for role in ROLES}
    dtype = str(np.dtype(base["embed"]["embedding"].dtype))
    # transformers before 4.56 reads torch_dtype.
    fields = config_to_hf(FAMILIES[family], config) | ids | {"dtype": dtype, "torch_dtype": dtype}
    write_json(folder / "config.json", fields | dict(extras.fields))


def _write_shards(folder: Path, shards: Sequence[Sequence[ToWrite]]) -> None:
    """Write the weights as one file, or as several with their index, which comes last."""
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", shards[0], {"format": "pt"})
        return
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for name, tensors in zip(names, shards, strict=True):
        write_safetensors(folder / name, tensors, {"format": "pt"})
    total = sum(size(tensor.shape) * tensor.dtype.itemsize for tensors in shards for tensor in tensors)
    places = {tensor.name: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})


def _save_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Write a tokenizer's files, with null for the special tokens that it lacks.

    Left out, transformers would add those of the family's own tokenizer as new ids, which have no row in the embedding.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    write_json(path, dict.fromkeys(f"{role}_token" for role in ("bos", "eos", "unk", "pad")) | read_json(path))


def tensors_of(config: ModelConfig, base: PyTree, family: str, layout: str, where: str) -> list[ToWrite]:
    """The published tensors of a base tree, each computed only when its `read` is called.

    Args:
        config: the model's features.
        base: its weights.
        family: our name of its family.
        layout: the naming scheme, "hf" or "gguf".
        where: the folder or file, for messages.

    Raises:
        ValueError: an unknown family; an int8 base; leaves that are missing, unknown or of the wrong shape, all named.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; the families are {', '.join(FAMILIES)}")
    if is_quantised(base):
        raise ValueError(
            f"{where}: the base is in int8, which this format does not have; export the model it was quantised from"
        )
    rows = FAMILIES[family].parameters(config)
    leaves = _leaves(base)
    if problems := _problems(leaves, rows, config):
        raise ValueError(f"{where}: the base tree does not fit this config: {'; '.join(problems)}")
    pairs = [(tensor, row) for row in rows for tensor in _tensors(row, layout, config, leaves[row.path])]
    return _fuse(pairs, layout)


def _leaves(base: PyTree) -> dict[str, Array]:
    """The leaves by their paths, "/" between the keys."""
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(base)}


def _problems(leaves: Mapping[str, Array], rows: Sequence[Row], config: ModelConfig) -> list[str]:
    """What is wrong with a base tree that should have exactly these parameters, a phrase for each leaf."""
    problems = []
    for row in rows:
        shape = (config.layers, *row.shape(config)) if row.stacked else row.shape(config)
        if row.path not in leaves:
            problems.append(f"{row.path} is missing")
        elif leaves[row.path].shape != shape:
            problems.append(f"{row.path} has shape {list(leaves[row.path].shape)}, expected {list(shape)}")
    known = {row.path for row in rows}
    return problems + [f"{path} is unknown" for path in leaves if path not in known]


def _fuse(tensors: list[tuple[ToWrite, Row]], layout: str) -> list[ToWrite]:
    """Join tensors of the same name, which are parts of one stored tensor, in order along their output axis."""
    parts: dict[str, list[ToWrite]] = {}
    axes: dict[str, int] = {}
    for tensor, row in tensors:
        parts.setdefault(tensor.name, []).append(tensor)
        axes[tensor.name] = transform_of(row, layout).outputs_axis(len(row.axes))

    def join(name: str, group: list[ToWrite]) -> ToWrite:
        if len(group) == 1:
            return group[0]
        axis, first = axes[name], group[0].shape
        shape = (*first[:axis], sum(part.shape[axis] for part in group), *first[axis + 1 :])
        return ToWrite(name, shape, group[0].dtype, lambda: np.concatenate([part.read() for part in group], axis))

    return [join(name, group) for name, group in parts.items()]


def _tensors(row: Row, layout: str, config: ModelConfig, leaf: Array) -> list[ToWrite]:
    """The stored tensors of a parameter: one for each layer if it is stacked, else one."""
    transform = transform_of(row, layout)
    shape = row.shape(config)[::-1] if transform.flips else row.shape(config)

    def tensor(i: int | None, name: str) -> ToWrite:
        def read() -> np.ndarray:
            return transform.write(np.asarray(leaf if i is None else leaf[i]), config)

        return ToWrite(name, shape, np.dtype(leaf.dtype), read)

    return [tensor(i if row.stacked else None, name) for i, name in enumerate(names_of(row, layout, config))]
