"""A base model together with what was trained on it: what every format is written from, and read into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jaxsteer.io.files import Json
from jaxsteer.io.load import LoadedModel
from jaxsteer.models.transformer import Model, Network
from jaxsteer.types import Plan, PyTree, Steering


@dataclass(frozen=True)
class SteeredModel:
    """A base model and its steering, ready for `forward(steered.model, steered.base, steered.steering, batch)`.

    loaded    the base model
    plan      the steering's slots; () if the weights hold everything
    steering  the steering tree of `plan`
    source    where the base can be loaded from again: a hub id, a folder or a file
    notes     what is known of the training, as in `SteeringFile.notes`
    lost      what the files do not hold of what was written, a sentence each
    """

    loaded: LoadedModel
    plan: Plan = ()
    steering: Steering = field(default_factory=dict)
    source: str = ""
    notes: Mapping[str, Json] = field(default_factory=dict)
    lost: Sequence[str] = ()

    @property
    def model(self) -> Model:
        """The static part, for `forward`."""
        return Model(self.loaded.config, self.plan)

    @property
    def base(self) -> PyTree:
        """The base tree."""
        return self.loaded.base

    @property
    def network(self) -> Network:
        """Model, weights and steering as one pytree."""
        return Network(self.model, self.base, self.steering)
