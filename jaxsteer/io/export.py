"""Export to a Hugging Face folder: the family's table read backwards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxsteer.io.files import write_json
from jaxsteer.io.safetensors_file import ToWrite, write_safetensors
from jaxsteer.io.stored import get, names
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.families import FAMILIES, Row, config_to_hf
from jaxsteer.types import PyTree


def save_hf(
    folder: str | Path,
    config: ModelConfig,
    base: PyTree,
    family: str,
    tokenizer: Any = None,
    stop_tokens: Sequence[int] = (),
) -> None:
    """Write a folder that transformers (and `load_model`) reads as this model, bit for bit.

    model.safetensors and the JSON files are each written under a temporary name and renamed; the config comes
    last, so a folder that has one is whole. Weights keep their dtype.

    Args:
        folder: where to; made if it is not there.
        config: the model's features.
        base: its weights, arrays in the layout of `init_base`.
        family: our name of its family.
        tokenizer: a transformers tokenizer to be saved along.
        stop_tokens: ids that end a reply, for generation_config.json; by default the tokenizer's eos.

    Raises:
        ValueError: an unknown family; leaves that are missing, unknown or of the wrong shape, all named.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; the families are {', '.join(FAMILIES)}")
    table = FAMILIES[family]
    rows = table.parameters(config)
    problems, expected = [], {row.path for row in rows}
    for row in rows:
        leaf = get(base, row.path)
        shape = (config.layers, *row.shape(config)) if row.stacked else row.shape(config)
        if leaf is None:
            problems.append(f"{row.path} is missing")
        elif leaf.shape != shape:
            problems.append(f"{row.path} has shape {list(leaf.shape)}, expected {list(shape)}")
    paths = ["/".join(str(key.key) for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(base)]
    problems += [f"{path} is unknown" for path in paths if path not in expected]
    if problems:
        raise ValueError(f"{folder}: the base tree is not that of this config: {'; '.join(problems)}")

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _fuse([(tensor, row) for row in rows for tensor in _tensors(row, config, get(base, row.path))])
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    ids = {}
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    stops = list(stop_tokens)
    generation = ids | ({"eos_token_id": stops if len(stops) > 1 else stops[0]} if stops else {})
    write_json(folder / "generation_config.json", generation)
    dtype = str(np.dtype(get(base, "embed/embedding").dtype))
    write_json(folder / "config.json", config_to_hf(table, config) | generation | {"dtype": dtype})


def _fuse(tensors: list[tuple[ToWrite, Row]]) -> list[ToWrite]:
    """One tensor for all of a name: they are its parts, in order, joined along their outputs."""
    parts: dict[str, list[ToWrite]] = {}
    axes: dict[str, int] = {}
    for tensor, row in tensors:
        parts.setdefault(tensor.name, []).append(tensor)
        axes[tensor.name] = row.transform.outputs_axis(len(row.axes))

    def join(name: str, of: list[ToWrite]) -> ToWrite:
        if len(of) == 1:
            return of[0]
        axis, first = axes[name], of[0].shape
        shape = (*first[:axis], sum(part.shape[axis] for part in of), *first[axis + 1 :])
        return ToWrite(name, shape, of[0].dtype, lambda: np.concatenate([part.read() for part in of], axis))

    return [join(name, of) for name, of in parts.items()]


def _tensors(row: Row, config: ModelConfig, leaf: Any) -> list[ToWrite]:
    shape = row.shape(config)[::-1] if row.transform.flips else row.shape(config)

    def one(i: int | None, name: str) -> ToWrite:
        def read() -> np.ndarray:
            return row.transform.write(np.asarray(leaf if i is None else leaf[i]), config)

        return ToWrite(name, shape, np.dtype(leaf.dtype), read)

    return [one(i if row.stacked else None, name) for i, name in enumerate(names(row, "hf", config))]
