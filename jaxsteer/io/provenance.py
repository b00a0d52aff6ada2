"""How steering came about: notes that stay true when it is converted, merged in part, or distilled.

The notes of a trained steering file hold the settings of its training under "config". They describe that file alone: of
steering made from it they become the first entry of the list under "provenance", and an entry for each later step
follows.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, NamedTuple

from jaxsteer.io.files import Json
from jaxsteer.plans import plan_to_json
from jaxsteer.types import Plan

if TYPE_CHECKING:
    from jaxsteer.io.steering_file import SteeringFile


def provenance_of(notes: Mapping[str, Json], model_name: str, plan: Plan) -> list[dict[str, Json]]:
    """The steps that led to a steering file, oldest first; [] if its notes say nothing.

    Args:
        notes: of the file.
        model_name, plan: of the file.
    """
    earlier = notes.get("provenance")
    steps = [step for step in earlier if isinstance(step, dict)] if isinstance(earlier, list) else []
    if isinstance(config := notes.get("config"), dict):
        steps.append({"by": "training", "model": model_name, "plan": plan_to_json(plan), "config": config})
    return steps


def training_settings(notes: Mapping[str, Json]) -> dict[str, Json]:
    """The settings of the training run in a steering file's notes; {} if it has none.

    Of steering that was made from trained steering, those of that training.
    """
    steps = notes.get("provenance")
    trained = [step.get("config") for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []
    found = [settings for settings in [*trained, notes.get("config")] if isinstance(settings, dict)]
    return found[-1] if found else {}


class BaseOptions(NamedTuple):
    """Keywords of `load_model` for a base model as it was when steering was trained on it.

    quantised  whether it was in int8
    tokenizer  where its tokenizer was taken from, if not from the model
    """

    quantised: bool = False
    tokenizer: str | None = None


def derived_notes(by: str, origin: SteeringFile | None, **facts: Json) -> dict[str, Json]:
    """The notes of steering made from other steering, or from a fine-tuned model.

    What says how to ask the model stays. The settings of the training, which are not those of the new steering, go into
    its provenance.

    Args:
        by: what makes it, such as "to_steering", "keep_kind" or "fold_weights".
        origin: the file that it is made from; None if it is made from a model.
        facts: anything else worth knowing of this step, as JSON: its settings, the data it saw.
    """
    step = {"by": by, **facts, "jaxsteer": library_version()}
    if origin is None:
        return {"provenance": [step]}
    kept = {key: value for key, value in origin.notes.items() if key not in ("config", "provenance")}
    return kept | {"provenance": [*origin.provenance, step]}


def library_version() -> str:
    """The version of jaxsteer, or "unknown"."""
    try:
        return version("jaxsteer")
    except PackageNotFoundError:  # used from a checkout
        return "unknown"
