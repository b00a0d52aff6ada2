"""Checkpoints of steerling, the implementation of arXiv 2603.00425: low-rank adapters or fixed vectors in each block.

A folder with pytorch_model.bin or model.safetensors, which also holds the base model, or a PEFT folder with
adapter_steerer.pt for joint adaptation. Activation, α and positions are not stored.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from jaxsteer.interventions import FixedVector
from jaxsteer.io.formats import peft
from jaxsteer.io.formats.format import Format, Given
from jaxsteer.io.formats.pieces import Piece, ask, gather, low_rank, matrix_shape, values
from jaxsteer.io.load import LoadedModel
from jaxsteer.io.pickles import open_pickle
from jaxsteer.io.safetensors_file import open_safetensors
from jaxsteer.io.sample import compare_samples, sample
from jaxsteer.io.steered import SteeredModel
from jaxsteer.io.stored import Stored, check_names, with_prefix
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.families import FAMILIES

JOINT = "adapter_steerer.pt"
STATES = ("pytorch_model.bin", "model.safetensors")
"""Files of a whole state, in the order in which steerling looks for them."""
BASE = "base_model."
_KEY = re.compile(r"layer(\d{1,6})_(block|attn|mlp)(?:\.(down|up)\.weight)?")
NEEDS = {
    "positions": "all: the tokens that are steered, unless it was trained with --intervene-last",
    "alpha": "factor of the shift, 1 by default in steerling",
    "activation": "none, silu, relu, gelu or tanh",
}


def recognises(path: Path) -> bool:
    """Whether a folder holds adapters or fixed vectors by the names of steerling."""
    if (path / JOINT).is_file():
        return True
    file = _state_file(path)
    if file is None or (path / "config.json").exists():
        return False
    try:
        return any(name.startswith(("adapters.", "deltas.")) for name in _open(file))
    except (ValueError, OSError):
        return True  # reading it will say what is wrong


def _state_file(path: Path) -> Path | None:
    """The file of the whole state in a folder."""
    return next((path / name for name in STATES if (path / name).is_file()), None)


def _open(file: Path) -> dict[str, Stored]:
    """The tensors of a file."""
    return open_safetensors(file)[0] if file.suffix == ".safetensors" else open_pickle(file)


def read(path: Path, loaded: LoadedModel | None, given: Given) -> SteeredModel:
    """Read a checkpoint.

    Raises:
        ValueError: damaged files; a site that the family does not have; something that is not stored and not given.
    """
    joint = (path / JOINT).is_file()
    file = path / JOINT if joint else _state_file(path)
    if file is None:
        raise ValueError(f"{path}: holds none of {', '.join((*STATES, JOINT))}")
    tensors = _open(file)
    vectors = _with_prefix(tensors, "deltas.")
    adapters = tensors if joint else _with_prefix(tensors, "adapters.")
    if bool(vectors) == bool(adapters):
        raise ValueError(f"{file}: expected either adapters.layer0_block.down.weight ... or deltas.layer0_block ...")
    needs = NEEDS if adapters else {"positions": NEEDS["positions"]}
    model = ask(path, "steerling", loaded, given, needs)
    _check_positions(file, given)
    _check_base(file, tensors, model)
    pieces = _adapters(file, adapters, model, given) if adapters else _vectors(file, vectors, model)
    steered = gather(file, model, pieces)
    if not joint:
        return steered
    updates = peft.read(path, model, given)
    return replace(updates, plan=updates.plan + steered.plan, steering={**updates.steering, **steered.steering})


def _with_prefix(tensors: Mapping[str, Stored], prefix: str) -> dict[str, Stored]:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _check_positions(file: Path, given: Given) -> None:
    """Refuse positions that steerling does not have, and the one that jaxsteer does not have."""
    if given.positions == "all":
        return
    raise ValueError(
        f"{file}: --positions is {given.positions}; steerling steers all tokens (--positions all) or, if trained with "
        "--intervene-last, the last one of whatever the model is given, every new one included. jaxsteer has no such "
        "positions: train it again for all tokens, at positions=last (the token before an answer) or =completion"
    )


def _check_base(file: Path, tensors: Mapping[str, Stored], model: LoadedModel) -> None:
    """Compare the base model in the file, if there is one, with the one that is given."""
    stored = _with_prefix(tensors, BASE)
    if not stored or model.sample is None:
        return
    family = FAMILIES[model.family]
    check_names(with_prefix(stored, "hf", family), "hf", family, model.config, str(file))
    found = compare_samples(sample(stored, "hf", family, model.config), model.sample)
    if found.verdict == "another":
        raise ValueError(f"{file}: was trained on another base model than {model.name}: {found.reason}. Give --model")


def _site(file: Path, target: str, config: ModelConfig) -> str:
    """Our site where steerling steers a target: the output of the block, of post_attention_layernorm, of the MLP."""
    if config.norm != "rms":
        raise ValueError(f"{file}: steerling knows Llama-like blocks only, this base model has others")
    if target == "mlp" and config.post_norm:
        raise ValueError(
            f"{file}: steers the MLP's output before the norm that this family has behind it; jaxsteer's site mlp is "
            "behind the norm. Train it again there, or at block"
        )
    if target == "attn":
        return "attn" if config.post_norm else "mlp.in"
    return target


def _adapters(file: Path, tensors: Mapping[str, Stored], model: LoadedModel, given: Given) -> list[Piece]:
    """Low-rank adapters: down [R, D], up [D, R]."""
    width = model.config.width
    found: dict[tuple[int, str], dict[str, tuple[str, Stored]]] = {}
    for name, tensor in tensors.items():
        match = _KEY.fullmatch(name)
        if match is None or match[3] is None:
            raise ValueError(
                f"{file}: {reprlib.repr(name)} is no adapter's weight; expected names like layer0_block.down.weight"
            )
        found.setdefault((int(match[1]), match[2]), {})[match[3]] = (name, tensor)
    pieces = []
    for (layer, target), parts in found.items():
        if set(parts) != {"down", "up"}:
            raise ValueError(f"{file}: layer{layer}_{target} has {' and '.join(parts)} only, expected down and up")
        site = _site(file, target, model.config)
        (down_name, down), (up_name, up) = parts["down"], parts["up"]
        rank = matrix_shape(file, down_name, down)[0]
        params = {"D": values(file, down_name, down, (rank, width)), "U": values(file, up_name, up, (width, rank))}
        assert given.activation is not None
        assert given.alpha is not None
        pieces.append(Piece(low_rank(rank, given.activation, given.alpha), site, layer, params))
    return pieces


def _vectors(file: Path, tensors: Mapping[str, Stored], model: LoadedModel) -> list[Piece]:
    """Fixed vectors [D]."""
    pieces = []
    for name, tensor in tensors.items():
        match = _KEY.fullmatch(name)
        if match is None or match[3] is not None:
            raise ValueError(
                f"{file}: deltas.{reprlib.repr(name)} is no fixed vector; expected names like deltas.layer0_block"
            )
        site = _site(file, match[2], model.config)
        params = {"v": values(file, f"deltas.{name}", tensor, (model.config.width,))}
        pieces.append(Piece(FixedVector(), site, int(match[1]), params))
    return pieces


FORMAT = Format(
    name="steerling",
    holds="low-rank steering, fixed vectors, joint adaptation",
    programs="steerling (the paper's implementation)",
    recognises=recognises,
    read=read,
    asks=tuple(NEEDS),
)
