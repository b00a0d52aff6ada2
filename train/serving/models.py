"""What can be asked: a base model, and adapters that come and go while it is served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxsteer.adapters import Adapters
from jaxsteer.io import LoadedModel, SteeringFile
from jaxsteer.types import Plan


class UnknownModel(ValueError):
    """A request names a model that is not served; the text says which are."""


class Refused(ValueError):
    """A steering file that may not be read or cannot be served; the text says why, and what to do."""


@dataclass(frozen=True)
class Served:
    """What the `model` of a request names.

    name     of the model
    adapter  for `Request.adapter`: the adapter's place in the stacked tree, by a name of its own that is never used
             again; None for the base model
    plan     of the adapter alone; () for the base model
    slots    the common plan's slot for each of the plan's, by name. It holds for the roster's adapters of now: code on
             the engine's thread asks `adapters.slot_names(plan)`
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
        raise NotImplementedError


@dataclass(frozen=True)
class Candidate:
    """A steering file that has been read and checked, and the name under which it is to be served."""

    name: str
    file: SteeringFile


class Roster:
    """A base model, and the adapters that steer it, stacked in one tree.

    Made by `open_roster`. Reading is safe on any thread; changes are made by `Engine.load` and `Engine.unload`.

    Attributes:
        loaded: the base model.
        adapters: the stacked adapters; None before there are any.
        places: number of adapters that there is room for.
    """

    loaded: LoadedModel
    adapters: Adapters | None
    places: int

    @property
    def base(self) -> Served:
        """The base model."""
        raise NotImplementedError

    def names(self) -> list[str]:
        """Names of the models: the base first, then the adapters in the order in which they were loaded."""
        raise NotImplementedError

    def get(self, name: str) -> Served:
        """A model by its name.

        Raises:
            UnknownModel: there is none.
        """
        raise NotImplementedError

    def read(self, name: str, path: str) -> Candidate:
        """Read a steering file from one of the allowed folders and check that the base model can be steered by it.

        Slow, and safe on any thread. Symbolic links are followed first. What is outside the allowed folders is refused
        in the same words whether it exists or not.

        Args:
            name: for the adapter.
            path: of the file, or of the folder of a run.

        Raises:
            Refused: the name is taken or not a name; no folder is allowed, or the path is in none of them; there is no
                steering file, it is damaged, or it was made for another model.
        """
        raise NotImplementedError


def parse_sources(texts: Sequence[str]) -> dict[str, str]:
    """Steering as typed on a command line: PATH or NAME=PATH each, or only the word "none".

    Returns:
        Paths by the names under which they are served; a path without a name has that of its run's folder, or the
        file's name without its ending.

    Raises:
        ValueError: a name that is given twice, or "none" beside others.
    """
    raise NotImplementedError


def open_roster(
    sources: Mapping[str, str],
    model: str | None = None,
    *,
    dtype: str = "auto",
    places: int = 8,
    folders: Sequence[str | Path] = (),
    other_base: bool = False,
) -> Roster:
    """Load a base model and the adapters to start with, with a progress bar.

    Args:
        sources: paths of steering files or runs by name, see `parse_sources`; none for the base model alone.
        model: the base model; by default the one that the first steering file names.
        dtype: data type of the weights, see `train.base_models.load`.
        places: number of adapters that there is room for at a time.
        folders: from which `Roster.read` may load; none for no loading.
        other_base: steer a model of the same config whose weights are others.

    Raises:
        ValueError: no such file, more of them than places, or one of another base model than the first.
    """
    raise NotImplementedError
