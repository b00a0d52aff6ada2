"""Settings as plain values: dataclasses to and from what JSON and YAML can hold, checked by their types.

A dataclass that is one of several that a field can have (a task) says which, as "type".
"""

from __future__ import annotations

import dataclasses
import datetime
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from jaxsteer.plans import did_you_mean

T = TypeVar("T")

TYPE = "type"
"""The key that says which dataclass a mapping is."""


def to_plain(value: Any, hint: Any = Any) -> Any:
    """A dataclass, and all that is in it, as dicts, lists and scalars; `from_plain` reads it back.

    Args:
        value: the dataclass.
        hint: the type of the field that holds it; where several dataclasses can be there, TYPE says which it is.
    """
    options = _options(hint)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = typing.get_type_hints(type(value))
        several = sum(map(dataclasses.is_dataclass, options)) > 1
        fields = {
            each.name: to_plain(getattr(value, each.name), hints[each.name]) for each in dataclasses.fields(value)
        }
        return {TYPE: type(value).__name__, **fields} if several else fields
    if isinstance(value, Mapping):
        return {name: to_plain(each, _inner(options, Mapping)) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(each, _inner(options, tuple)) for each in value]
    is_whole = type(value) is int and float in options and int not in options
    return float(value) if is_whole else value  # as it is read again


def _inner(options: tuple[Any, ...], kind: type) -> Any:
    """The type of what is in a tuple or a mapping."""
    for option in options:
        origin, arguments = typing.get_origin(option), typing.get_args(option)
        if isinstance(origin, type) and issubclass(origin, kind):
            return arguments[1] if kind is Mapping else _element(arguments)
    return Any


def _element(arguments: tuple[Any, ...]) -> Any:
    """The type of a tuple's elements."""
    return arguments[0] if len(arguments) == 2 and arguments[1] is ... else typing.Union[arguments]  # noqa: UP007


def from_plain(kind: type[T], data: Any, where: str) -> T:
    """Build a dataclass from plain values; settings that are not given have their defaults.

    Args:
        kind: the dataclass.
        data: a mapping from the names of its fields.
        where: the file, for error messages.

    Raises:
        ValueError: no mapping, an unknown setting (the message suggests one), a missing one, a value of another type,
            or values that the dataclass refuses.
    """
    return _dataclass(kind, data, where, "")


def _dataclass(kind: Any, data: Any, where: str, path: str) -> Any:
    if not isinstance(data, Mapping):
        raise ValueError(f"{where}: {path or 'the file'} must be settings, one `name: value` a line; got {data!r}")
    hints = typing.get_type_hints(kind)
    known = {each.name: each for each in dataclasses.fields(kind) if each.init}
    for name in data:
        if name not in known and name != TYPE:
            raise ValueError(f"{where}: {_at(path, name)}: no such setting{_hint(str(name), known)}")
    required = dataclasses.MISSING
    for name, each in known.items():
        if name not in data and each.default is required and each.default_factory is required:
            raise ValueError(f"{where}: {_at(path, name)} is missing")
    values = {name: _value(hints[name], data[name], where, _at(path, name)) for name in known if name in data}
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _value(hint: Any, data: Any, where: str, path: str) -> Any:
    """A value of the type that a field wants."""
    options = _options(hint)
    if data is None and type(None) in options:
        return None
    kinds = [kind for kind in options if dataclasses.is_dataclass(kind)]
    if kinds and isinstance(data, Mapping):
        return _dataclass(_chosen(kinds, data, where, path), data, where, path)
    for option in options:
        try:
            return _scalar(option, data, where, path)
        except TypeError:
            continue
    wanted = " or ".join(dict.fromkeys(map(_described, options)))
    raise ValueError(f"{where}: {path} must be {wanted}, got {data!r}{_suggested(options, data)}")


def _chosen(kinds: list[Any], data: Mapping[str, Any], where: str, path: str) -> Any:
    """Which of several dataclasses a mapping is."""
    names = {kind.__name__: kind for kind in kinds}
    if len(kinds) == 1:
        return kinds[0]
    if data.get(TYPE) in names:
        return names[data[TYPE]]
    if TYPE not in data:
        raise ValueError(f"{where}: {path}.{TYPE} is missing; there are {', '.join(names)}")
    raise ValueError(f"{where}: {path}.{TYPE}: no such kind{_hint(str(data[TYPE]), names)}")


def _scalar(option: Any, data: Any, where: str, path: str) -> Any:
    """A value of one type.

    Raises:
        TypeError: it has another.
    """
    origin, arguments = typing.get_origin(option), typing.get_args(option)
    if origin is Literal:
        words = {True: ("yes", "on", "true"), False: ("no", "off", "false")}  # YAML reads these words as switches
        named = words.get(data, ()) if isinstance(data, bool) else (data,)
        for each in arguments:
            if each in named and type(each) is not bool:
                return each
    elif origin is tuple and isinstance(data, list | tuple):
        inner = _element(arguments)
        return tuple(_value(inner, each, where, f"{path}[{index}]") for index, each in enumerate(data))
    elif origin in (dict, Mapping) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        if isinstance(data, Mapping):
            return {name: _value(arguments[1], each, where, f"{path}.{name}") for name, each in data.items()}
    elif option is float and isinstance(data, int | float | str) and not isinstance(data, bool):
        try:
            return float(data)  # 3e-3 is a text to YAML
        except ValueError:
            pass
    elif option is str and isinstance(data, datetime.date):
        return data.isoformat()  # 2026-01-31 is a day to YAML
    elif (option in (int, str, bool) and type(data) is option) or option is Any:
        return data
    raise TypeError


def _options(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type; annotations left out."""
    if typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _described(option: Any) -> str:
    """A type as a reader of YAML knows it."""
    if option is type(None):
        return "null"
    if typing.get_origin(option) is Literal:
        return ", ".join(map(str, typing.get_args(option)))
    if typing.get_origin(option) is tuple:
        return "a list"
    words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    return "settings" if dataclasses.is_dataclass(option) else words.get(option, str(option))


def _suggested(options: tuple[Any, ...], data: Any) -> str:
    words = [
        str(word) for option in options if typing.get_origin(option) is Literal for word in typing.get_args(option)
    ]
    return _hint(str(data), words) if words else ""


def _hint(word: str, known: Any) -> str:
    """A suggestion for a misspelt word, as the end of a sentence; else those that there are; "" if there are none."""
    names = [str(each) for each in known]
    return did_you_mean(word, names) or (f"; there are {', '.join(names)}" if names else "")


def _at(path: str, name: Any) -> str:
    return f"{path}.{name}" if path else str(name)
