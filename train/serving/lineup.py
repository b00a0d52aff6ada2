"""The models of one moment: the base, the adapters stacked beside it, and what clients know of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxsteer.adapters import Adapters
from jaxsteer.inference.scheduling import Request
from jaxsteer.io import SteeringFile
from jaxsteer.plans import did_you_mean
from jaxsteer.types import Plan


class UnknownModel(ValueError):
    """A request names a model that is not served; the text says which are."""


class Refused(ValueError):
    """A steering file that may not be read or cannot be served; the text says why, and what to do."""


@dataclass(frozen=True)
class Served:
    """What the `model` of a request names.

    name     of the model
    adapter  for `Request.adapter`: the adapter's name in the stacked tree, which no other ever gets; None for the base
             model
    plan     of the adapter alone; () for the base model
    slots    the common plan's slot for each of the plan's, by name. They change when adapters are stacked anew: work
             for `Engine.run` asks the adapters that it is given, `adapters.slot_names(served.plan)`
    notes    of the training: template, chat, date, max_new_tokens, ...
    path     of the steering file; None for the base model
    created  Unix time in seconds at which it was loaded
    """

    name: str
    adapter: str | None
    plan: Plan
    slots: Mapping[str, str]
    notes: Mapping[str, Any]
    path: Path | None
    created: int

    @property
    def chat(self) -> bool:
        """Whether its prompts are conversations: as in training, for the base model if it has a chat template."""
        return bool(self.notes.get("chat", False))

    @property
    def template(self) -> str:
        """Text around a plain prompt, with "{prompt}" in it, as in training."""
        return self.notes.get("template", "{prompt}")

    @property
    def date(self) -> str | None:
        """ISO date that the chat template prints, as in training; None for today."""
        return self.notes.get("date")

    @property
    def max_new_tokens(self) -> int | None:
        """Maximum number of tokens of an answer in training; None if it is not known."""
        return self.notes.get("max_new_tokens")

    def strength(self, given: float | Mapping[str, float] | None) -> dict[str, float]:
        """The strength of each of the plan's slots that is not 1, for `Request.strength` (see `Engine.submit`).

        Args:
            given: a factor for all slots, or one for each slot that is named; None for 1.

        Raises:
            ValueError: not a finite number, a slot that the plan does not have, or a strength for the base model.
        """
        if given is None:
            return {}
        names = [slot.name for slot in self.plan]
        if not names:
            raise ValueError(f"strength: {self.name} is not steered, so it has none; leave it out, or name an adapter")
        factors = dict(given) if isinstance(given, Mapping) else dict.fromkeys(names, given)
        for name, factor in factors.items():
            if name not in names:
                hint = did_you_mean(name, names)
                raise ValueError(f"strength: {self.name} has no slot {name!r}{hint}; it has {', '.join(names)}")
            if isinstance(factor, bool) or not isinstance(factor, int | float) or not math.isfinite(factor):
                raise ValueError(f"strength: {factor!r} is not a finite number")
        return {name: float(factor) for name, factor in factors.items() if factor != 1}


@dataclass(frozen=True)
class Candidate:
    """A steering file that has been read and checked, and the name under which it is to be served."""

    name: str
    file: SteeringFile


@dataclass(frozen=True)
class Lineup:
    """The adapters of one moment. Never changed, but replaced as a whole, so that any thread may read it.

    adapters  the stacked tree; None before there are any
    files     the file behind each name in the tree, those of unloaded adapters whose place was not reused included
    served    the models by name, the base first
    """

    adapters: Adapters | None
    files: Mapping[str, SteeringFile]
    served: Mapping[str, Served]

    def slots(self, adapter: str | None) -> Mapping[str, str]:
        """The common plan's slot for each slot of an adapter, unloaded or not.

        Raises:
            ValueError: its place was reused.
        """
        if adapter is None:
            return {}
        if self.adapters is None or adapter not in self.files:
            raise ValueError(f"adapter {adapter!r} was unloaded")
        return self.adapters.slot_names(self.files[adapter].plan)

    def translated(self, request: Request) -> Request:
        """A request whose strengths are by slots of its adapter's own plan, in terms of the common plan.

        Raises:
            ValueError: a slot that the adapter does not have.
        """
        slots = self.slots(request.adapter) if isinstance(request.adapter, str) else {}
        if unknown := sorted(set(request.strength) - set(slots)):
            raise ValueError(
                f"{request.prompt.source}: strength for {', '.join(unknown)}; the model's slots: {', '.join(slots)}"
            )
        return replace(request, strength={slots[name]: factor for name, factor in request.strength.items()})
