"""Interventions of pyreft: LoReFT, DiReFT and their relatives at the outputs of blocks.

A folder with pyvene's config.json and a file intkey_KEY.bin for each intervention. Which tokens are steered belongs to
pyreft's data module, the activation to its Python classes; neither is stored.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxsteer.interventions import DiReFT, FixedVector, LoReFT
from jaxsteer.interventions.loreft import NONE
from jaxsteer.io.files import Json, read_json
from jaxsteer.io.formats.format import Format, Given
from jaxsteer.io.formats.pieces import Piece, ask, gather, matrix_shape, values
from jaxsteer.io.load import LoadedModel
from jaxsteer.io.pickles import open_pickle
from jaxsteer.io.steered import SteeredModel
from jaxsteer.io.stored import Stored
from jaxsteer.types import Intervention, Positions

NEAREST = {
    "block_input": "block of the layer before",
    "mlp_output": "mlp",
    "mlp_input": "mlp.in",
    "attention_output": "attn",
    "attention_value_output": "attn.heads",
    "head_attention_value_output": "attn.heads",
}
"""Components that are not read, and our site that comes nearest."""
NEEDS = {
    "positions": "as in its data module: f2+l3 is first:2+last:3",
    "activation": "its act_fn: none, silu, relu, gelu or tanh",
}
ORTHONORMAL = 0.05  # what rounding to bf16 leaves, with room
Params = dict[str, np.ndarray]


@dataclass(frozen=True)
class _File:
    """One intervention's tensors."""

    path: Path
    tensors: Mapping[str, Stored]
    width: int

    def value(self, name: str, *shape: int) -> np.ndarray:
        """A tensor of a known shape."""
        if name not in self.tensors:
            raise ValueError(f"{self.path}: has no {name}, only {', '.join(list(self.tensors)[:20]) or 'nothing'}")
        return values(self.path, name, self.tensors[name], shape)

    def rank(self, name: str, axis: int) -> int:
        """The rank by a matrix's shape."""
        if name not in self.tensors:
            raise ValueError(f"{self.path}: has no {name}, only {', '.join(list(self.tensors)[:20]) or 'nothing'}")
        rank = matrix_shape(self.path, name, self.tensors[name])[axis]
        if rank > self.width:
            raise ValueError(f"{self.path}: {name} has rank {rank}, the base model has width {self.width}")
        return rank

    def rotation(self) -> np.ndarray:
        """Rᵀ [D, r], whose columns are orthonormal."""
        rotation = self._rotation()
        wide = rotation.astype(np.float64)
        if not np.abs(wide.T @ wide - np.eye(wide.shape[1])).max() < ORTHONORMAL:
            raise ValueError(f"{self.path}: the columns of rotate_layer are not orthonormal; is the file damaged?")
        return rotation

    def _rotation(self) -> np.ndarray:
        """Rᵀ as it is, or from the parameters of torch's orthogonal parametrisation.

        These are Householder vectors below a diagonal of signs, times a square matrix.
        """
        if "rotate_layer" in self.tensors:
            return self.value("rotate_layer", self.width, self.rank("rotate_layer", 1))
        prefix = "rotate_layer.parametrizations.weight."
        rank = self.rank(f"{prefix}original", 1)
        if rank == self.width:
            raise ValueError(f"{self.path}: a rotation of the whole width is stored in a way that is not read")
        raw = self.value(f"{prefix}original", self.width, rank).astype(np.float64)
        base = self.value(f"{prefix}0.base", self.width, self.width).astype(np.float32)
        rotation = np.eye(self.width, rank)
        for column in range(rank)[::-1]:
            vector = np.concatenate([np.zeros(column), [1.0], raw[column + 1 :, column]])
            rotation -= np.outer(vector, (2 / (vector @ vector)) * (vector @ rotation))
        return base @ (rotation * np.trunc(np.diagonal(raw))).astype(np.float32)

    def source(self, prefix: str = "learned_source.") -> Params:
        """W [r, D] and b [r]."""
        rank = self.rank(f"{prefix}weight", 0)
        return {"W": self.value(f"{prefix}weight", rank, self.width), "b": self.value(f"{prefix}bias", rank)}


def _loreft(file: _File, activation: str) -> tuple[Intervention, Params]:
    """LoReFT."""
    params = file.source("") | {"R": file.rotation().T}
    return LoReFT(rank=len(params["R"]), activation=activation), params


def _direft(file: _File, activation: str) -> tuple[Intervention, Params]:
    """DiReFT."""
    params = file.source() | {"R": file.rotation().T}
    return DiReFT(rank=len(params["R"]), activation=activation), params


def _free(file: _File) -> tuple[Params, np.ndarray | None]:
    """W, b and a free R, and the bias of its projection."""
    params = file.source()
    rank = len(params["W"])
    params["R"] = file.value("proj_layer.weight", rank, file.width)
    return params, file.value("proj_layer.bias", rank) if "proj_layer.bias" in file.tensors else None


def _noreft(file: _File, activation: str) -> tuple[Intervention, Params]:
    """LoReFT with a free R; its second bias is subtracted from the first one, which an activation forbids."""
    params, bias = _free(file)
    if bias is not None and bias.any():
        if activation != NONE:
            raise ValueError(
                f"{file.path}: a NoReFT with an activation and add_bias=True; jaxsteer's loreft(constrained=False) has "
                "no second bias. Train it again there, or with add_bias=False"
            )
        params["b"] = (params["b"].astype(np.float32) - bias.astype(np.float32)).astype(params["b"].dtype)
    return LoReFT(rank=len(params["R"]), activation=activation, constrained=False), params


def _nodireft(file: _File, activation: str) -> tuple[Intervention, Params]:
    """DiReFT with a free R, as ours is; its second bias is not used."""
    params, _ = _free(file)
    return DiReFT(rank=len(params["R"]), activation=activation), params


def _consreft(file: _File, activation: str) -> tuple[Intervention, Params]:
    """LoReFT with W = 0, without an activation."""
    rotation = file.rotation()
    rank = rotation.shape[1]
    b = file.value("learned_source", rank)
    return LoReFT(rank=rank), {"R": rotation.T, "W": np.zeros((rank, file.width), b.dtype), "b": b}


def _lobireft(file: _File, activation: str) -> tuple[Intervention, Params]:
    """A fixed vector Rᵀ b."""
    rotation = file.rotation()
    shift = rotation.astype(np.float64) @ file.value("learned_source", rotation.shape[1]).astype(np.float64)
    return FixedVector(), {"v": shift.astype(np.float32)}


KINDS: dict[str, Callable[[_File, str], tuple[Intervention, Params]]] = {
    "LoreftIntervention": _loreft,
    "DireftIntervention": _direft,
    "NoreftIntervention": _noreft,
    "NodireftIntervention": _nodireft,
    "ConsreftIntervention": _consreft,
    "LobireftIntervention": _lobireft,
}
"""pyreft's classes that are exactly ours, by how their tensors are read."""
LINEAR = ("ConsreftIntervention", "LobireftIntervention")
"""Classes without an activation."""


def recognises(path: Path) -> bool:
    """Whether a folder holds interventions by the names of pyvene."""
    try:
        return path.is_dir() and next(path.glob("intkey_*.bin"), None) is not None
    except OSError:
        return False


def read(path: Path, loaded: LoadedModel | None, given: Given) -> SteeredModel:
    """Read a folder that ReftModel.save wrote.

    Raises:
        ValueError: damaged files; an intervention that jaxsteer does not have; positions or activation not given.
    """
    kinds = _kinds(path / "config.json")
    classes = {kind for kind, _ in kinds.values()}
    needed = NEEDS if classes - set(LINEAR) else {"positions": NEEDS["positions"]}
    model = ask(path, "pyreft", loaded, given, needed)
    positions = Positions.parse(str(given.positions))
    pieces = []
    for key, (kind, layer) in kinds.items():
        name = f"intkey_{key}.bin"
        tensors = open_pickle(path / name)
        file = _File(path / name, tensors, model.config.width)
        method, params = KINDS[kind](file, str(given.activation))
        pieces.append(Piece(method, "block", layer, params))
    return gather(path, model, pieces, positions)


def _kinds(path: Path) -> dict[str, tuple[str, int]]:
    """The interventions that config.json lists: key -> (class, layer)."""
    config = read_json(path)
    names = ("representations", "intervention_types", "sorted_keys")
    lists = [part for name in names if isinstance(part := config.get(name), list)]
    if len(lists) < len(names) or len(set(map(len, lists))) > 1 or not lists[0]:
        raise ValueError(f"{path}: expected {', '.join(names)}, lists with an entry for each intervention")
    if (mode := config.get("mode", "parallel")) != "parallel":
        raise ValueError(f"{path}: mode is {reprlib.repr(mode)}; only interventions in parallel are read")
    representations, classes, keys = lists
    kinds: dict[str, tuple[str, int]] = {}
    for representation, kind in zip(representations, classes, strict=True):
        layer = _layer(path, representation)
        key = next((key for key in _names(layer) if key in keys), None)
        if key is None or key in kinds:
            why = "is not among sorted_keys" if key is None else "has a second intervention; only one is read"
            raise ValueError(f"{path}: the output of block {layer} {why}")
        kinds[key] = _class(path, kind), layer
    return kinds


def _names(layer: int) -> tuple[str, ...]:
    """The keys of the first intervention at the output of a block: pyvene's, and as it was before version 0.1.3."""
    return f"layer_{layer}_comp_block_output_unit_pos_nunit_1#0", f"layer.{layer}.comp.block_output.unit.pos.nunit.1#0"


def _layer(path: Path, representation: Json) -> int:
    """The layer of a representation, which must be the output of a block and have its parameters for itself."""
    if not isinstance(representation, list) or len(representation) < 4 or type(representation[0]) is not int:
        raise ValueError(f"{path}: {reprlib.repr(representation)} is no representation (layer, component, unit, ...)")
    layer, component, unit, units, *rest = representation
    where = f"{path}: the representation at layer {layer}"
    if component != "block_output":
        site = NEAREST.get(component) if isinstance(component, str) else None
        hint = f"; jaxsteer's site {site} comes nearest" if site else ""
        raise ValueError(f"{where} is at {reprlib.repr(component)}; only block_output is read{hint}")
    if unit != "pos" or units != 1:
        raise ValueError(f"{where} steers {reprlib.repr(units)} of {reprlib.repr(unit)}, expected 1 of pos")
    if extra := [value for value in rest[1:] if value is not None]:
        raise ValueError(f"{where} has links, groups, subspaces or sources ({reprlib.repr(extra[0])}); none are read")
    return layer


def _class(path: Path, text: Json) -> str:
    """The class in "<class 'pyreft.interventions.NAME'>"."""
    match = re.fullmatch(r"<class '[\w.]{0,200}?(\w{1,100})'>", text) if isinstance(text, str) else None
    if match is None or match[1] not in KINDS:
        what = match[1] if match else reprlib.repr(text)
        raise ValueError(f"{path}: {what} is no intervention that jaxsteer has; it has those of {', '.join(KINDS)}")
    return match[1]


FORMAT = Format(
    name="pyreft",
    holds="LoReFT, DiReFT and relatives at block",
    programs="pyreft",
    recognises=recognises,
    read=read,
    asks=tuple(NEEDS),
)
