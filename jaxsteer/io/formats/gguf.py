"""Whole models as GGUF files for llama.cpp and Ollama: steering that weights take is merged, the tokenizer included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jaxsteer.io.formats.format import Format, Given, Use, WriteOptions
from jaxsteer.io.formats.hf import dtype_of, merged, refuse_merging
from jaxsteer.io.formats.pieces import file_at
from jaxsteer.io.gguf_config import (
    ROPE_FACTORS,
    config_from_gguf,
    config_to_gguf,
    parameters_of,
    refuse_config,
    rope_factors,
)
from jaxsteer.io.gguf_file import Gguf, GgufValue, open_gguf
from jaxsteer.io.gguf_tokenizer import vocabulary_to_gguf
from jaxsteer.io.gguf_write import FILE_TYPES, KINDS, Encoded, encoded, in_memory, plain, write_gguf
from jaxsteer.io.hf_folder import tensors_of
from jaxsteer.io.identity import fingerprint
from jaxsteer.io.load import LoadedModel, load_model
from jaxsteer.io.sample import sample
from jaxsteer.io.steered import SteeredModel
from jaxsteer.io.stored import read_base
from jaxsteer.io.tokenizer import stop_tokens_from_gguf
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.families import FAMILIES
from jaxsteer.models.families.table import Family
from jaxsteer.types import Plan

FILE = "model.gguf"

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"} | {kind: kind for kind in KINDS}
"""`WriteOptions.dtype` -> ggml's type of the matrices."""

KIND = "ggml_type"
"""Among the notes of a reduced model: the type of its matrices, which are fp32 in memory."""


def recognises(path: Path) -> bool:
    """Whether a path is a GGUF file of a model of our families, or a folder with one."""
    try:
        metadata = open_gguf(file_at(path, FILE)).metadata
    except (ValueError, OSError):
        return False
    known = {family.gguf for family in FAMILIES.values()}
    return metadata.get("general.architecture") in known and metadata.get("general.type", "model") == "model"


def read(path: Path, loaded: LoadedModel | None, given: Given) -> SteeredModel:
    """The model in a file, or in a folder's model.gguf."""
    return SteeredModel(load_model(file_at(path, FILE)), source=str(path))


def refuse(plan: Plan, family: Family, config: ModelConfig, options: WriteOptions) -> list[str]:
    """Why a model with this plan cannot become a GGUF file, a sentence for each reason."""
    reasons = refuse_merging(plan, family, config, family.llama_cpp.biases)
    if options.dtype is not None and options.dtype not in DTYPES:
        reasons.append(f"dtype {options.dtype!r} cannot be written; a GGUF file's are {', '.join(DTYPES)}")
    return reasons + refuse_config(family, config)


def reduce(steered: SteeredModel, options: WriteOptions) -> SteeredModel:
    """The model with its steering merged into the weights, which are rounded as the file rounds them.

    Raises:
        ValueError: an int8 base; a slot that cannot be merged; a tokenizer that GGUF cannot describe.
    """
    loaded = steered.loaded
    model = merged(steered, WriteOptions(dtype="float32")).loaded
    kind = DTYPES[options.dtype or str(dtype_of(loaded))]
    file = in_memory(Path(FILE), *_contents(model, kind))
    family, config = config_from_gguf(file)
    stored = parameters_of(file)
    base = read_base(stored, "gguf", family, config, FILE)
    chosen = sample(stored, "gguf", family, config)
    model = replace(
        loaded, config=config, base=base, family=family.name, fingerprint=fingerprint(config), sample=chosen
    )
    return replace(
        steered,
        loaded=model,
        plan=(),
        steering={},
        notes={KIND: kind},
        lost=(*steered.lost, *_lost(loaded, file, kind)),
    )


def _lost(loaded: LoadedModel, file: Gguf, kind: str) -> list[str]:
    """What llama.cpp will not do as the model did, a sentence each."""
    lost = []
    config = loaded.config
    if config.window is not None and not FAMILIES[loaded.family].llama_cpp.windowed:
        lost.append(
            f"llama.cpp does not compute the sliding window of this family: beyond {config.window} tokens, each "
            "attends to all before it"
        )
    own = DTYPES[str(dtype_of(loaded))]
    if kind not in (own, "F32"):
        lost.append(f"the matrices were {own}, and are rounded to {kind}")
    other = sum(tensor.form == "F16" and len(tensor.shape) == 2 for tensor in file.tensors.values())
    if kind != "F16" and other:
        lost.append(f"{other} matrices are F16: their rows are not made of whole {kind} blocks of 32 values")
    stops = set(stop_tokens_from_gguf(file.metadata))
    if loaded.stop_tokens and stops != set(loaded.stop_tokens):
        lost.append(f"replies end at the tokens {sorted(stops)}, not at {sorted(loaded.stop_tokens)}")
    return lost


def write(reduced: SteeredModel, folder: Path, options: WriteOptions) -> None:
    """Write model.gguf."""
    write_gguf(folder / FILE, *_contents(reduced.loaded, reduced.notes[KIND]))


def _contents(loaded: LoadedModel, kind: str) -> tuple[dict[str, GgufValue], Sequence[Encoded]]:
    """Metadata and tensors of a model's file whose matrices have this type."""
    config, family = loaded.config, FAMILIES[loaded.family]
    tensors = [encoded(tensor, kind) for tensor in tensors_of(config, loaded.base, loaded.family, "gguf", FILE)]
    if (factors := rope_factors(config)) is not None:
        tensors.insert(0, plain(ROPE_FACTORS, factors))
    metadata: dict[str, GgufValue] = config_to_gguf(family, config) | {
        "general.type": "model",
        "general.name": loaded.name,
        "general.file_type": FILE_TYPES[kind],
        "general.quantization_version": 2,
    }
    return metadata | vocabulary_to_gguf(loaded), tensors


FORMAT = Format(
    name="gguf",
    holds="a whole model; LoRA, and steering that weights or biases take, is merged",
    programs="llama.cpp, Ollama",
    whole=True,
    recognises=recognises,
    read=read,
    refuse=refuse,
    reduce=reduce,
    write=write,
    options=("dtype",),
    verify="llama",
    use=Use(
        "gguf",
        "finetune",
        'llama-cli -m FOLDER/model.gguf -p "Hello"',
        "bash",
        tags=("gguf",),
    ),
)
