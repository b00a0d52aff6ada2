"""The strength of steering as typed on a command line: `--strength 0.5`, or `--strength lora=0.5 post_block=2`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from jaxsteer.plans import did_you_mean
from jaxsteer.types import Plan


def parse_strength(texts: Sequence[str], plan: Plan, *, option: str = "--strength") -> dict[str, float] | None:
    """The strength of each slot whose strength is not 1.

    Args:
        texts: as typed, "0.5" for every slot or "slot=0.5" for one; a slot's own comes before that of all.
        plan: the plan of the steering file; () for the pretrained model.
        option: how the user named it, for error messages.

    Returns:
        A factor by slot name; None if every slot has 1, which is the steering as it was trained.

    Raises:
        ValueError: no finite number, a slot that the plan does not have, or one that is given twice.
    """
    if not texts:
        return None
    if not plan:
        raise ValueError(f"{option}: nothing is steered here; give a steering file")
    names = [slot.name for slot in plan]
    given: dict[str, float] = {}
    for text in texts:
        name, equals, number = text.rpartition("=")
        if equals and name not in names:
            hint = did_you_mean(name, names)
            raise ValueError(f"{option} {text}: no slot {name!r}{hint}; the plan has {', '.join(names)}")
        if name in given:
            raise ValueError(f"{option} {text}: " + (f"{name!r} is given twice" if name else "two for all slots"))
        given[name] = _number(f"{option} {text}", number)
    everywhere = given.pop("", 1.0)
    factors = {name: given.get(name, everywhere) for name in names}
    changed = {name: factor for name, factor in factors.items() if factor != 1}
    return changed or None


def _number(typed: str, number: str) -> float:
    try:
        value = float(number)
    except ValueError:
        hint = " (arguments without a name, such as prompts, come before the options)" if typed.startswith("--") else ""
        raise ValueError(f"{typed}: neither a number nor SLOT=NUMBER{hint}") from None
    if not math.isfinite(value):
        raise ValueError(f"{typed}: must be a finite number")
    return value


def show_strength(strength: Mapping[str, float] | None) -> str:
    """For titles: "" or ", strength lora 0.5"."""
    if not strength:
        return ""
    return ", strength " + ", ".join(f"{name} {factor:g}" for name, factor in strength.items())
