"""Steering plans: read from text ("nonlinear(rank=8) @ block layers=last:8"), checked, and as JSON."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from jaxsteer.interventions import METHODS
from jaxsteer.models.config import ModelConfig, projections_of, site_dims
from jaxsteer.types import ACTIVATIONS, PROJECTIONS, SITES, Intervention, Plan, Positions, Slot

GRAMMAR = "method(setting=value, ...) @ site,site layers=... positions=... name=..."
_SLOT = re.compile(
    r"\s*(?P<method>\w+)\s*(?:\((?P<settings>.*)\))?\s*@\s*(?P<sites>[\w.]+(?:\s*,\s*[\w.]+)*)(?P<rest>.*)"
)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ " (did you mean ...?)" with the known word that is nearest to an unknown one; empty if none is near."""
    names = {name.lower(): name for name in known}
    nearest = difflib.get_close_matches(word.lower(), names, n=1)
    return f" (did you mean {names[nearest[0]]}?)" if nearest else ""


def parse_plan(texts: Sequence[str], config: ModelConfig) -> Plan:
    """Read a steering plan from one text per slot.

    Each text is `method(setting=value, ...) @ site,site layers=... positions=... name=...`; everything after the sites
    is optional. The site `projections` stands for every projection of the model. layers: all · 0-3,7 · first:4 ·
    last:8. positions: as in `Positions.parse`. name: the slot's name; by default the method's.

    Args:
        texts: the slots, in order.
        config: the model's config, for its projections and layers.

    Raises:
        ValueError: a text cannot be read; the message quotes it and says what is allowed.
    """
    return tuple(_parse_slot(text, config) for text in texts)


def format_plan(plan: Plan) -> tuple[str, ...]:
    """A plan as texts that `parse_plan` reads back, settings at their defaults left out."""
    return tuple(map(_format_slot, plan))


def _format_slot(slot: Slot) -> str:
    name = method_name(slot.method)
    settings = ", ".join(
        f"{field.name}={getattr(slot.method, field.name)}"
        for field in dataclasses.fields(slot.method)  # type: ignore[arg-type]
        if getattr(slot.method, field.name) != field.default
    )
    text = f"{name}({settings})" if settings else name
    text += f" @ {','.join(slot.sites)}"
    text += "" if slot.layers is None else f" layers={','.join(map(str, slot.layers))}"
    text += "" if str(slot.positions) == "all" else f" positions={slot.positions}"
    return text + ("" if slot.name == name else f" name={slot.name}")


def _parse_slot(text: str, config: ModelConfig) -> Slot:
    match = _SLOT.fullmatch(text)
    if not match:
        raise ValueError(f"plan {text!r}: expected {GRAMMAR}")
    name = match["method"]
    options = {"layers": "all", "positions": "all", "name": name}
    try:
        if name not in METHODS:
            raise ValueError(_unknown_method(name))
        for item in match["rest"].split():
            key, equals, value = item.partition("=")
            if not equals or key not in options:
                hint = did_you_mean(key, options)
                raise ValueError(f"cannot read {item!r}{hint}; after the sites, use {', '.join(options)}, as key=value")
            options[key] = value
        sites: list[str] = []
        for site in (part.strip() for part in match["sites"].split(",")):
            if site not in (*SITES, "projections"):
                hint = did_you_mean(site, (*SITES, "projections"))
                raise ValueError(f"unknown site {site!r}{hint}; the sites are {', '.join(SITES)}, and projections")
            sites += projections_of(config) if site == "projections" else [site]
        return Slot(
            options["name"],
            _parse_method(name, match["settings"] or ""),
            tuple(sites),
            _parse_layers(options["layers"], config.layers),
            _parse_positions(options["positions"]),
        )
    except ValueError as error:
        raise ValueError(f"plan {text!r}: {error}") from None


def _unknown_method(name: str) -> str:
    return f"unknown method {name!r}{did_you_mean(name, METHODS)}; the methods are {', '.join(METHODS)}"


def _parse_positions(text: str) -> Positions:
    """As `Positions.parse`, with the nearest known word for one that is not known."""
    try:
        return Positions.parse(text)
    except ValueError as error:
        words = [part.partition(":")[0] for part in text.split("+")]
        known = ("all", "prompt", "completion", "last", "first")
        hints = [did_you_mean(word, known) for word in words if word not in known]
        raise ValueError(f"{error}{next(filter(None, hints), '')}") from None


def _parse_method(name: str, text: str) -> Intervention:
    """A method with the settings in "setting=value, ..."."""
    method = METHODS[name]
    known = {field.name: field for field in dataclasses.fields(method)}  # type: ignore[arg-type]
    settings = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or key not in known:
            hint = did_you_mean(key, known)
            raise ValueError(f"{name} has no setting {item!r}{hint}; its settings are: {', '.join(known) or 'none'}")
        settings[key] = _parse_value(key, value, known[key].default)
    return method(**settings)


def _parse_value(key: str, text: str, default: object) -> object:
    """A setting's value, of the type of its default."""
    try:
        value = ast.literal_eval(text)
        if isinstance(default, float) and type(value) is int:
            value = float(value)
    except (ValueError, SyntaxError, TypeError, ArithmeticError, MemoryError, RecursionError):
        value = text
    if type(value) is not type(default):
        raise ValueError(f"{key} needs a value like {default!r}, got {text!r}")
    return value


def _parse_layers(text: str, num_layers: int) -> tuple[int, ...] | None:
    if text == "all":
        return None
    layers: set[int] = set()
    for part in text.split(","):
        if end := re.fullmatch(r"(first|last):(\d+)", part):
            count = int(end[2])
            if not 1 <= count <= num_layers:
                raise ValueError(f"layers {part}: the model has {num_layers} layers")
            layers |= set(range(count) if end[1] == "first" else range(num_layers - count, num_layers))
        elif span := re.fullmatch(r"(\d+)(?:-(\d+))?", part):
            first, last = int(span[1]), int(span[2] or span[1])
            if last >= num_layers:
                raise ValueError(f"layers {part}: the model has layers 0 to {num_layers - 1}")
            layers |= set(range(first, last + 1))
        else:
            hint = did_you_mean(part.partition(":")[0], ("all", "first", "last"))
            raise ValueError(f"cannot read layers {text!r}{hint}; use all, 0-3,7, first:4 or last:8")
    return tuple(sorted(layers))


def validate_plan(plan: Plan, config: ModelConfig) -> None:
    """Check that a steering plan fits a model.

    Raises:
        ValueError: a slot name that is used twice, empty or contains "/"; an unknown site or layer; a site where the
            method cannot be used; settings that do not fit the site, such as a rank that is too large. The message
            names the slot and says what is allowed.
    """
    names = [slot.name for slot in plan]
    for slot in plan:
        where = f"slot {slot.name!r}"
        if names.count(slot.name) > 1:
            raise ValueError(f"{where}: two slots have this name; slot names must be unique")
        if not slot.name or "/" in slot.name:
            raise ValueError(f"{where}: a slot's name must not be empty or contain '/'")
        allowed = PROJECTIONS if slot.method.kind == "weight" else ACTIVATIONS
        if not slot.sites or len(set(slot.sites)) < len(slot.sites):
            raise ValueError(f"{where}: needs at least one site, each once; got {list(slot.sites)}")
        for site in slot.sites:
            if site not in SITES:
                hint = did_you_mean(site, SITES)
                raise ValueError(f"{where}: unknown site {site!r}{hint}; the sites are {', '.join(SITES)}")
            if site not in allowed:
                raise ValueError(
                    f"{where}: {method_name(slot.method)} is a {slot.method.kind} method and cannot be used at "
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
                f"{where}: layers {list(layers)} are not all in the model; it has layers 0 to {config.layers - 1}"
            )


def method_name(method: Intervention) -> str:
    """The name of a method in METHODS.

    Raises:
        ValueError: the method's class is not in METHODS.
    """
    for name, cls in METHODS.items():
        if type(method) is cls:
            return name
    raise ValueError(f"{type(method).__name__} is not in METHODS ({', '.join(METHODS)})")


def plan_to_json(plan: Plan) -> list[dict[str, Any]]:
    """A plan as lists and dicts that JSON can hold; `plan_from_json` reads it back."""
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
    """Read the output of `plan_to_json`, which may come from a damaged file.

    Raises:
        ValueError: a method that this version does not have, a setting that the method does not have, or a value of
            another type.
    """
    slots = []
    if not isinstance(data, list | tuple):
        raise ValueError(f"a plan is {data!r:.80}, expected a list of slots")
    for entry in data:
        _check_entry(entry)
        settings = dict(entry["method"])
        name = settings.pop("name")
        if name not in METHODS:
            raise ValueError(f"slot {entry['name']!r}: {_unknown_method(name)}")
        known = {field.name for field in dataclasses.fields(METHODS[name])}  # type: ignore[arg-type]
        if unknown := sorted(set(settings) - known):
            raise ValueError(
                f"slot {entry['name']!r}: {name} has no setting {', '.join(unknown)}; "
                f"its settings are: {', '.join(sorted(known)) or 'none'}"
            )
        _check_settings(entry["name"], settings, METHODS[name])
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


def _check_entry(entry: Any) -> None:
    """Refuse a slot whose fields are not of their types."""
    texts = lambda value: isinstance(value, list | tuple) and all(isinstance(text, str) for text in value)
    numbers = lambda value: isinstance(value, list | tuple) and all(type(number) is int for number in value)
    named = lambda value: isinstance(value, dict) and isinstance(value.get("name"), str)
    allowed = {
        "name": (lambda value: isinstance(value, str), "a text"),
        "method": (named, "an object with a name"),
        "sites": (texts, "a list of texts"),
        "layers": (lambda value: value is None or numbers(value), "null or a list of integers"),
        "positions": (lambda value: isinstance(value, str), "a text"),
    }
    if not isinstance(entry, dict):
        raise ValueError(f"a slot is {entry!r:.80}, expected an object")
    for field, (check, what) in allowed.items():
        if field not in entry:
            raise ValueError(f"slot {entry.get('name')!r:.80}: {field} is missing, expected {what}")
        if not check(entry[field]):
            raise ValueError(f"slot {entry.get('name')!r:.80}: {field} is {entry[field]!r:.80}, expected {what}")


def _check_settings(slot: str, settings: dict[str, Any], method: type) -> None:
    """Refuse a method's settings that are not of the types of its own."""
    for field in dataclasses.fields(method):
        value, kind = settings.get(field.name, field.default), type(field.default)
        fits = type(value) is kind or kind not in (bool, int, float, str)
        if kind is float:
            fits = type(value) is int or (type(value) is float and math.isfinite(value))
        if not fits:
            raise ValueError(f"slot {slot!r}: {field.name} is {value!r:.80}, expected {kind.__name__}")
