"""adapter_config.json of PEFT's LoRA folders: which layers are updated, with which rank and scale."""

from __future__ import annotations

import math
import re
import reprlib
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import regex

from jaxsteer.io.files import Json, read_json
from jaxsteer.io.formats.updates import Update, alpha_for

CONFIG = "adapter_config.json"

_READ = frozenset(
    {"peft_type", "bias", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"}
    | {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights"}
)
_HARMLESS = frozenset(
    {"task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version"}
    | {"lora_dropout", "fan_in_fan_out", "loftq_config", "eva_config", "corda_config", "lora_ga_config"}
    | {"megatron_core", "qalora_group_size", "ensure_weight_tying", "velora_config", "runtime_config"}
)
"""Fields that change training, or repeat what the model says, but no forward pass."""
_INITS = (True, False, "gaussian", "eva", "orthogonal", "pissa")
"""Initialisations after which the base model is as it was, and the one whose change of it can be computed again."""
_SECONDS = 0.1
"""How long matching a pattern of a file may take: some need years."""
_PATTERNS = 4096
"""Patterns in a field above which it is refused."""
_LAYER = re.compile(r"(?:.*?\.)?(?P<list>\w+)\.(?P<layer>\d+)\.(?P<tail>.+)")


@dataclass(frozen=True)
class PeftConfig:
    """What a LoRA folder's adapter_config.json says, checked; the methods take full names of layers.

    where  the file, for messages
    raw    its fields
    """

    where: str
    raw: Mapping[str, Json]

    @property
    def dora(self) -> bool:
        """Whether all updates are DoRA."""
        return bool(self.raw.get("use_dora"))

    @property
    def pissa(self) -> bool:
        """Whether the base model is to be changed by PiSSA's initial factors."""
        return self.raw.get("init_lora_weights") == "pissa"

    def rank(self, name: str) -> int:
        """The rank of a layer's update."""
        return self._pattern("rank_pattern", name, self.raw["r"])

    def scale(self, name: str) -> float:
        """The scale of a layer's update."""
        alpha, rank = self._pattern("alpha_pattern", name, self.raw["lora_alpha"]), self.rank(name)
        return alpha / (math.sqrt(rank) if self.raw.get("use_rslora") else rank)

    def targets(self, name: str) -> bool:
        """Whether PEFT would update a layer."""
        if self._listed("exclude_modules", name):
            return False
        target = self.raw["target_modules"]
        if isinstance(target, str):
            return target == "all-linear" or self._matches("target_modules", target, name)
        return name in target or (self._listed("target_modules", name) and self._in_layers(name))

    def _listed(self, field: str, name: str) -> bool:
        """Whether a field with names or a pattern has a layer."""
        value = self.raw.get(field) or []
        if isinstance(value, str):
            return self._matches(field, value, name)
        return any(name == end or name.endswith(f".{end}") for end in value)

    def _in_layers(self, name: str) -> bool:
        """Whether a layer is in one of the blocks that layers_to_transform lists."""
        chosen, lists = self.raw.get("layers_to_transform"), self.raw.get("layers_pattern") or []
        if chosen is None or chosen == []:
            return True
        found = _LAYER.fullmatch(name)
        in_list = found is not None and (not lists or found["list"] in ([lists] if isinstance(lists, str) else lists))
        return in_list and int(found["layer"]) in (chosen if isinstance(chosen, list) else [chosen])  # type: ignore[index]

    def _pattern(self, field: str, name: str, default: Json) -> Json:
        """The value of a pattern that matches a layer's name or its end."""
        patterns = self.raw.get(field) or {}
        return next((v for key, v in patterns.items() if self._matches(field, rf"(.*\.)?({key})", name)), default)

    def _matches(self, field: str, pattern: str, name: str) -> bool:
        """Whether a regular expression of the file matches all of a name, in bounded time."""
        try:
            return _compiled(pattern).fullmatch(name, timeout=_SECONDS) is not None
        except (regex.error, TimeoutError, OverflowError, MemoryError, RecursionError) as error:
            raise ValueError(f"{self.where}: {field} has no usable pattern for {name} ({str(error)[:200]})") from None


@lru_cache(4 * _PATTERNS)
def _compiled(pattern: str) -> regex.Pattern[str]:
    """A compiled regular expression."""
    return regex.compile(pattern)


def read_config(path: Path) -> PeftConfig:
    """Read and check an adapter_config.json.

    Raises:
        ValueError: a field that is not LoRA on layers of the model, or not of its type; all are named.
    """
    raw = read_json(path)
    if raw.get("peft_type") != "LORA":
        kind = reprlib.repr(raw.get("peft_type"))
        raise ValueError(f"{path}: peft_type is {kind}; only LORA (with its variants) is read")
    problems = [*_unsupported(raw), *_malformed(raw)]
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}")
    return PeftConfig(str(path), raw)


def _unsupported(raw: Mapping[str, Json]) -> list[str]:
    """What the file asks for that is not an update of the model's layers."""
    problems = []
    for field, value in raw.items():
        # Null, false and empty are how PEFT writes that something is not used.
        if field not in _READ | _HARMLESS and value:
            problems.append(
                f"{field} is {reprlib.repr(value)}, which is not supported; merge it with peft and load that"
            )
    if raw.get("bias", "none") != "none":
        problems.append(
            f"bias is {reprlib.repr(raw['bias'])}; trained biases are not read: merge them with peft and load that"
        )
    init = raw.get("init_lora_weights", True)
    if not any(init is known or (isinstance(init, str) and init == known) for known in _INITS):
        problems.append(
            f"init_lora_weights is {reprlib.repr(init)}, which changes the base model; save it again with peft's "
            "path_initial_model_for_weight_conversion, which makes it plain LoRA"
        )
    return problems


def _malformed(raw: Mapping[str, Json]) -> list[str]:
    """Fields that are not of their type."""
    texts = lambda value: isinstance(value, list) and all(isinstance(text, str) for text in value)
    names = lambda value: isinstance(value, str) or texts(value)
    rank = lambda value: type(value) is int and 0 < value < 2**31
    number = lambda value: type(value) in (int, float) and abs(value) < 2**63
    patterns = lambda check: (
        lambda value: isinstance(value, dict) and len(value) <= _PATTERNS and all(map(check, value.values()))
    )
    flag = lambda value: isinstance(value, bool)
    layers = lambda value: all(type(i) is int for i in (value if isinstance(value, list) else [value]))
    checks = {
        "r": (rank, "an integer above 0"),
        "lora_alpha": (number, "a number"),
        "rank_pattern": (patterns(rank), "an object of integers above 0"),
        "alpha_pattern": (patterns(number), "an object of numbers"),
        "use_rslora": (flag, "true or false"),
        "use_dora": (flag, "true or false"),
        "target_modules": (names, "a list of names, a pattern or all-linear"),
        "exclude_modules": (names, "a list of names or a pattern"),
        "layers_to_transform": (layers, "an integer or a list of them"),
        "layers_pattern": (names, "a name or a list of them"),
    }
    required = {"r", "lora_alpha", "target_modules"}
    return [
        f"{field} is {reprlib.repr(raw.get(field))}; expected {allowed}"
        for field, (check, allowed) in checks.items()
        if (raw.get(field) is not None or field in required) and not check(raw.get(field))
    ]


def config_of(updates: Mapping[str, Update], names: Collection[str]) -> dict[str, Json]:
    """The fields of an adapter_config.json.

    The scale is written as lora_alpha / r and never by use_rslora, which some programs pass over.

    Args:
        updates: by the full names of the layers.
        names: of all linear layers in the model's blocks, by which a short name is known to be unambiguous.
    """
    ranks = {name: update.rank for name, update in updates.items()}
    alphas = {name: _plain(alpha_for(update.scale, update.rank)) for name, update in updates.items()}
    rank, rank_pattern = _as_pattern(ranks, names)
    alpha, alpha_pattern = _as_pattern(alphas, names)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": any(update.magnitude is not None for update in updates.values()),
        **_targets(updates, names),
    }


def _plain(number: float) -> float:
    """An integer where a number is one."""
    return int(number) if number == int(number) else number


def _split(name: str) -> tuple[str, int, str]:
    """Name of the list of blocks, number of the block and name within it."""
    found = _LAYER.fullmatch(name)
    assert found is not None, name
    return found["list"], int(found["layer"]), found["tail"]


def _short(tail: str, names: Collection[str]) -> str:
    """The last part of a name within a block, or all of it where the last part has two meanings."""
    last = tail.rpartition(".")[2]
    return last if len({_split(name)[2] for name in names if name.endswith(f".{last}")}) == 1 else tail


def _targets(updates: Mapping[str, Update], names: Collection[str]) -> dict[str, Json]:
    """The fields that say which layers are updated: by short names where these say it exactly."""
    tails = list(dict.fromkeys(_split(name)[2] for name in updates))
    layers = sorted({_split(name)[1] for name in updates})
    if len(updates) != len(tails) * len(layers):
        return {"target_modules": list(updates)}
    fields: dict[str, Json] = {"target_modules": [_short(tail, names) for tail in tails]}
    if layers != sorted({_split(name)[1] for name in names}):
        fields |= {"layers_to_transform": layers, "layers_pattern": _split(next(iter(updates)))[0]}
    return fields


def _as_pattern(values: Mapping[str, Json], names: Collection[str]) -> tuple[Json, dict[str, Json]]:
    """The most frequent value, and a pattern for the layers that have another."""
    default = Counter(values.values()).most_common(1)[0][0]
    of_tail: dict[str, dict[str, Json]] = {}
    for name, value in values.items():
        of_tail.setdefault(_split(name)[2], {})[name] = value
    pattern: dict[str, Json] = {}
    for tail, own in of_tail.items():
        if len(set(own.values())) == 1:
            own = {_short(tail, names): next(iter(own.values()))}
        pattern |= {name: value for name, value in own.items() if value != default}
    return default, pattern
