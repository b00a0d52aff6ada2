"""Shared by formats that are only read: what a file leaves to the person, tensors with checks, slots from pieces.

These files hold parameters for one layer at a time. A piece is what one layer has at one site; pieces of the same
method become one slot.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxsteer.interventions import LinearSteering, NonlinearSteering
from jaxsteer.interventions.loreft import NONE
from jaxsteer.io.files import read_json
from jaxsteer.io.formats.format import Given
from jaxsteer.io.load import LoadedModel
from jaxsteer.io.safetensors_file import FLOATS
from jaxsteer.io.steered import SteeredModel
from jaxsteer.io.stored import Stored
from jaxsteer.plans import method_name, validate_plan
from jaxsteer.types import ALL, Intervention, Plan, Positions, Slot, Steering

LowRank = LinearSteering | NonlinearSteering
"""Steering that other programs have as two linears with an activation between them."""


@dataclass(frozen=True, eq=False)
class Piece:
    """A method at one site of one layer, with its parameters."""

    method: Intervention
    site: str
    layer: int
    params: Mapping[str, np.ndarray]


def file_at(path: Path, name: str) -> Path:
    """A file itself, or the one of this name in a folder."""
    return path / name if path.is_dir() else path


def base_needed(path: Path, loaded: LoadedModel | None, hint: object = None) -> LoadedModel:
    """The base model.

    Args:
        path: the file or folder, for the message.
        loaded: the base model, if it is known.
        hint: what the file calls it.

    Raises:
        ValueError: it is not known.
    """
    if loaded is not None:
        return loaded
    perhaps = f", perhaps {reprlib.repr(hint)}" if isinstance(hint, str) and hint else ""
    raise ValueError(f"{path}: holds steering of a model; say of which, by --model{perhaps}")


def base_named_in(file: str, field: str) -> Callable[[Path], str | None]:
    """(folder) -> where the base model is, as a field of a JSON file in the folder says."""

    def named(path: Path) -> str | None:
        name = read_json(path / file).get(field)
        return name if isinstance(name, str) and name else None

    return named


def ask(path: Path, program: str, loaded: LoadedModel | None, given: Given, needs: Mapping[str, str]) -> LoadedModel:
    """The base model, once it and everything else that the file does not say is given.

    Args:
        path: the file or folder, for the message.
        program: what wrote it.
        loaded: the base model, if it is given.
        given: what the person says.
        needs: fields of `Given` that are needed, each with a few words on what it is.

    Raises:
        ValueError: names the options of all that is missing.
    """
    missing = [] if loaded is not None else ["--model (the base model that it was made for)"]
    missing += [f"--{name} ({what})" for name, what in needs.items() if getattr(given, name) is None]
    if missing:
        raise ValueError(f"{path}: files of {program} do not say everything; give {', '.join(missing)}")
    assert loaded is not None
    return loaded


def low_rank(rank: int, activation: str, alpha: float = 1.0) -> LowRank:
    """Low-rank steering with an activation; "none" is linear steering."""
    if activation == NONE:
        return LinearSteering(rank=rank, alpha=alpha)
    return NonlinearSteering(rank=rank, alpha=alpha, activation=activation)


def activation_of(method: LowRank) -> str:
    """The activation of low-rank steering, "none" of linear steering."""
    return method.activation if isinstance(method, NonlinearSteering) else NONE


def values(path: Path, name: str, tensor: Stored, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor in its own float type, fp64 rounded to fp32.

    Raises:
        ValueError: another shape, values that are no floats, or that are not finite.
    """
    if tensor.shape != shape:
        raise ValueError(f"{path}: {name} has shape {list(tensor.shape)}, expected {list(shape)}")
    if tensor.form not in FLOATS:
        raise ValueError(f"{path}: {name} holds {tensor.form} values; expected {', '.join(FLOATS)}")
    value = tensor.read()
    with np.errstate(over="ignore"):
        value = value.astype(np.float32) if value.dtype == np.float64 else value
    return finite(path, name, value)


def finite(path: Path, name: str, value: np.ndarray) -> np.ndarray:
    """A tensor's value, if it can be computed with.

    Raises:
        ValueError: values that are not finite.
    """
    if not _finite(value):
        raise ValueError(f"{path}: {name} holds values that are not finite")
    return value


def _finite(value: np.ndarray) -> bool:
    """Whether all values are finite."""
    return bool(np.isfinite(value.astype(np.float32)).all())


def matrix_shape(path: Path, name: str, tensor: Stored) -> tuple[int, int]:
    """The shape of a tensor of two axes.

    Raises:
        ValueError: it has another number of them, or is empty.
    """
    if len(tensor.shape) != 2 or 0 in tensor.shape:
        raise ValueError(f"{path}: {name} has shape {list(tensor.shape)}, expected a matrix")
    return tensor.shape[0], tensor.shape[1]


def gather(path: Path, base: LoadedModel, pieces: Sequence[Piece], positions: Positions = ALL) -> SteeredModel:
    """Pieces as a plan and its steering: one slot for each method and set of layers.

    Raises:
        ValueError: two pieces at one place; a plan that does not fit the model.
    """
    if problems := [piece.layer for piece in pieces if not 0 <= piece.layer < base.config.layers]:
        layers = base.config.layers
        raise ValueError(f"{path}: steers layer {max(problems)}; {base.name} has layers 0 to {layers - 1}")
    if bad := [
        f"{piece.site} of layer {piece.layer}" for piece in pieces if not all(map(_finite, piece.params.values()))
    ]:
        raise ValueError(f"{path}: gives values that are not finite at {bad[0]}")
    where: dict[tuple, dict[int, Piece]] = {}
    for piece in sorted(pieces, key=lambda piece: (piece.layer, piece.site)):
        kind = (piece.method, piece.site, tuple(value.dtype for value in piece.params.values()))
        if where.setdefault(kind, {}).setdefault(piece.layer, piece) is not piece:
            raise ValueError(f"{path}: two interventions at {piece.site} of layer {piece.layer}")
    groups: dict[tuple, dict[str, dict[int, Piece]]] = {}
    for (method, site, dtypes), layers_of in where.items():
        groups.setdefault((method, dtypes, tuple(layers_of)), {})[site] = layers_of
    slots: list[Slot] = []
    steering: Steering = {}
    for (method, _, layers), sites in groups.items():
        name = method_name(method)
        count = sum(slot.name.partition("_")[0] == name for slot in slots)
        name = name if not count else f"{name}_{count + 1}"
        chosen = None if layers == tuple(range(base.config.layers)) else layers
        slots.append(Slot(name, method, tuple(sites), chosen, positions))
        steering[name] = {site: _stack(list(of_site.values())) for site, of_site in sites.items()}
    plan: Plan = tuple(slots)
    try:
        validate_plan(plan, base.config)
    except ValueError as error:
        raise ValueError(f"{path}: does not fit {base.name}: {error}") from None
    return SteeredModel(base, plan, steering)


def _stack(pieces: Sequence[Piece]) -> dict[str, jnp.ndarray]:
    """The stacked parameters of pieces of one kind."""
    return {name: jnp.asarray(np.stack([piece.params[name] for piece in pieces])) for name in pieces[0].params}
