"""Plans as one line a slot, for configs and the command line: "nonlinear(rank=8) @ block layers=last:8"."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from jaxsteer.interventions import METHODS
from jaxsteer.models.config import ModelConfig, projections_of, site_dims
from jaxsteer.types import ACTIVATIONS, PROJECTIONS, SITES, Plan, Positions, Slot

GRAMMAR = "method(setting=value, ...) @ site,site layers=... positions=... name=..."
_SLOT = re.compile(
    r"\s*(?P<method>\w+)\s*(?:\((?P<settings>.*)\))?\s*@\s*(?P<sites>[\w.]+(?:\s*,\s*[\w.]+)*)(?P<rest>.*)"
)


def parse_plan(texts: Sequence[str], config: ModelConfig) -> Plan:
    """Read a plan from one text a slot.

    Each text is `method(setting=value, ...) @ site,site layers=... positions=... name=...`; all after the sites may be
    left out. The site `projections` stands for all that the model has. layers: all · 0-3,7 · first:4 · last:8.
    positions: as in `Positions.parse`. name: the slot's, by default the method's.

    Args:
        texts: the slots, in order.
        config: of the model, for its projections and layers.

    Raises:
        ValueError: names the text, what is wrong in it, and what is allowed.
    """
    return tuple(_parse_slot(text, config) for text in texts)


def _parse_slot(text: str, config: ModelConfig) -> Slot:
    where = f"plan {text!r}"
    found = _SLOT.fullmatch(text)
    if not found:
        raise ValueError(f"{where}: expected {GRAMMAR}")
    if found["method"] not in METHODS:
        raise ValueError(f"{where}: unknown method {found['method']!r}; known are {', '.join(METHODS)}")
    method = METHODS[found["method"]]
    known = {field.name: field for field in dataclasses.fields(method)}  # type: ignore[arg-type]
    settings = {}
    for item in filter(None, (part.strip() for part in (found["settings"] or "").split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or key not in known:
            allowed = ", ".join(known) or "none"
            raise ValueError(f"{where}: {found['method']} has no setting {item!r}; its settings are: {allowed}")
        settings[key] = _value(value, getattr(known[key], "default", None), f"{where}: {key}")
    options = {"layers": "all", "positions": "all", "name": found["method"]}
    for item in found["rest"].split():
        key, equals, value = item.partition("=")
        if not equals or key not in options:
            raise ValueError(
                f"{where}: cannot read {item!r}; after the sites may stand {', '.join(options)}, as key=value"
            )
        options[key] = value
    sites: list[str] = []
    for site in (part.strip() for part in found["sites"].split(",")):
        sites += projections_of(config) if site == "projections" else [site]
    try:
        positions = Positions.parse(options["positions"])
        built = method(**settings)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return Slot(options["name"], built, tuple(sites), _layers(options["layers"], config.layers, where), positions)


def _value(text: str, default: object, where: str) -> object:
    """A setting's value, of the type of its default."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if default is not dataclasses.MISSING and default is not None and type(value) is not type(default):
        raise ValueError(f"{where} needs a value like {default!r}, got {text!r}")
    return value


def _layers(text: str, num_layers: int, where: str) -> tuple[int, ...] | None:
    if text == "all":
        return None
    layers: set[int] = set()
    for part in text.split(","):
        if end := re.fullmatch(r"(first|last):(\d+)", part):
            count = int(end[2])
            if not 1 <= count <= num_layers:
                raise ValueError(f"{where}: {part} of a model with {num_layers} layers")
            layers |= set(range(count) if end[1] == "first" else range(num_layers - count, num_layers))
        elif span := re.fullmatch(r"(\d+)(?:-(\d+))?", part):
            layers |= set(range(int(span[1]), int(span[2] or span[1]) + 1))
        else:
            raise ValueError(f"{where}: cannot read layers {text!r}; use all, 0-3,7, first:4 or last:8")
    return tuple(sorted(layers))


def validate_plan(plan: Plan, config: ModelConfig) -> None:
    """Check that a plan can be carried out on a model.

    Raises:
        ValueError: two slots of one name; an unknown site or layer; a site that the method's kind has no place at; a
            rank that does not fit. The message names the slot and says what is allowed.
    """
    names = [slot.name for slot in plan]
    for slot in plan:
        where = f"slot {slot.name!r}"
        if names.count(slot.name) > 1:
            raise ValueError(f"{where}: two slots have this name; give each its own")
        if not slot.name or "/" in slot.name:
            raise ValueError(f"{where}: a name must not be empty or contain '/'")
        allowed = PROJECTIONS if slot.method.kind == "weight" else ACTIVATIONS
        if not slot.sites or len(set(slot.sites)) < len(slot.sites):
            raise ValueError(f"{where}: needs at least one site, each once; got {list(slot.sites)}")
        for site in slot.sites:
            if site not in SITES:
                raise ValueError(f"{where}: unknown site {site!r}; the sites are {', '.join(SITES)}")
            if site not in allowed:
                raise ValueError(
                    f"{where}: {method_name(slot.method)} is a {slot.method.kind} method and cannot sit at "
                    f"{site!r}; its sites are {', '.join(allowed)}"
                )
            try:
                slot.method.param_specs(site_dims(config, site))
            except ValueError as error:
                raise ValueError(f"{where} at {site!r}: {error}") from None
        layers = slot.active_layers(config.layers)
        if not layers or list(layers) != sorted(set(layers)):
            raise ValueError(f"{where}: layers must be ascending, each once, at least one; got {list(layers)}")
        if layers[0] < 0 or layers[-1] >= config.layers:
            raise ValueError(
                f"{where}: layers {list(layers)} are not all in the model, which has layers 0 to {config.layers - 1}"
            )


def method_name(method: Any) -> str:
    """The name under which METHODS lists a method."""
    for name, cls in METHODS.items():
        if type(method) is cls:
            return name
    raise ValueError(f"{type(method).__name__} is not in METHODS ({', '.join(METHODS)})")


def plan_to_json(plan: Plan) -> list[dict[str, Any]]:
    """A plan as plain lists and dicts; `plan_from_json` reads it back."""
    return [
        {
            "name": slot.name,
            "method": {"name": method_name(slot.method), **dataclasses.asdict(slot.method)},  # type: ignore[call-overload]
            "sites": list(slot.sites),
            "layers": None if slot.layers is None else list(slot.layers),
            "positions": str(slot.positions),
        }
        for slot in plan
    ]


def plan_from_json(data: Sequence[dict[str, Any]]) -> Plan:
    """Read a plan back.

    Raises:
        ValueError: a method that this version does not know, or a setting that its method does not have.
    """
    slots = []
    for entry in data:
        settings = dict(entry["method"])
        name = settings.pop("name")
        if name not in METHODS:
            raise ValueError(f"slot {entry['name']!r}: unknown method {name!r}; known are {', '.join(METHODS)}")
        known = {field.name for field in dataclasses.fields(METHODS[name])}  # type: ignore[arg-type]
        if unknown := sorted(set(settings) - known):
            raise ValueError(
                f"slot {entry['name']!r}: {name} has no setting {', '.join(unknown)}; it has {sorted(known)}"
            )
        layers = None if entry["layers"] is None else tuple(entry["layers"])
        slots.append(
            Slot(
                entry["name"],
                METHODS[name](**settings),
                tuple(entry["sites"]),
                layers,
                Positions.parse(entry["positions"]),
            )
        )
    return tuple(slots)
