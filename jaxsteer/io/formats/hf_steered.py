"""A whole model with its steering after the blocks, as code of the family's classes in transformers.

Every method @ block is held as it was trained, several in a row as well; all other slots are merged into the weights.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from jaxsteer.io.files import Json
from jaxsteer.io.formats.format import Format, Given, Use, WriteOptions
from jaxsteer.io.formats.hf import merged, refuse_dtype, refuse_merging, save_loaded
from jaxsteer.io.formats.remote_code import KEY, extras_of, is_folder, read_folder, steering_of
from jaxsteer.io.load import LoadedModel
from jaxsteer.io.steered import SteeredModel
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.families.table import Family
from jaxsteer.plans import method_name, plan_from_json, plan_to_json, validate_plan
from jaxsteer.types import Plan, Slot

KIND = "steered"

HELD = ("fixed", "linear", "nonlinear", "loreft", "direft")
"""The methods that the template computes."""


def _split(plan: Plan) -> tuple[Plan, Plan]:
    """The slots after blocks, and the others; a slot at both is divided."""
    after = tuple(replace(slot, sites=("block",)) for slot in plan if "block" in slot.sites)
    elsewhere = [(slot, tuple(site for site in slot.sites if site != "block")) for slot in plan]
    return after, tuple(replace(slot, sites=sites) for slot, sites in elsewhere if sites)


def refuse(plan: Plan, family: Family, config: ModelConfig, options: WriteOptions) -> list[str]:
    """Why a plan cannot be held, a sentence for each slot."""
    after, elsewhere = _split(plan)
    reasons = [*refuse_dtype(options), *refuse_merging(elsewhere, family, config, family.fields)]
    reasons += [_positions(slot) for slot in after if slot.positions.kind != "all"]
    reasons += [
        f"slot {slot.name!r}: {method_name(slot.method)} @ block is not among what these folders compute "
        f"({', '.join(HELD)}). Use jaxsteer itself"
        for slot in after
        if method_name(slot.method) not in HELD
    ]
    if not after:
        reasons.append("the plan has no slot @ block, so that its model needs no code: write it with --to hf")
    return reasons


def _positions(slot: Slot) -> str:
    return (
        f"slot {slot.name!r} ({method_name(slot.method)} @ block): steers positions {slot.positions}; a block in "
        "transformers does not know where the prompt ends, so that all are steered. Use jaxsteer itself"
    )


def reduce(steered: SteeredModel, options: WriteOptions) -> SteeredModel:
    """Slots after blocks as they are, the others merged."""
    after, elsewhere = _split(steered.plan)
    pick = lambda plan: {slot.name: {s: steered.steering[slot.name][s] for s in slot.sites} for slot in plan}
    whole = merged(replace(steered, plan=elsewhere, steering=pick(elsewhere)), options)
    return replace(whole, plan=after, steering=pick(after))


def _name_of(number: int, param: str) -> str:
    return f"steering.{number}.{param}"


def write(reduced: SteeredModel, folder: Path, options: WriteOptions) -> None:
    """Write the folder."""
    about = {"plan": plan_to_json(reduced.plan)}
    save_loaded(folder, reduced.loaded, extras_of(KIND, reduced, about, _name_of, keep=("steering",)))


def read(path: Path, loaded: LoadedModel | None, given: Given) -> SteeredModel:
    """The model in a folder, with its steering."""
    parts = read_folder(path, KIND)
    plan = _plan(parts.about.get("plan"), parts.loaded.config, f"{path / 'config.json'}: {KEY}")
    return SteeredModel(parts.loaded, plan, steering_of(parts, plan, _name_of, str(path)), str(path))


def _plan(data: Json, config: ModelConfig, where: str) -> Plan:
    """The plan that config.json says, checked."""
    try:
        plan = plan_from_json(data)
        validate_plan(plan, config)
    except ValueError as error:
        raise ValueError(f"{where} has no plan that can be read ({error})") from None
    if wrong := [slot.name for slot in plan if slot.sites != ("block",) or slot.positions.kind != "all"]:
        raise ValueError(f"{where}: slot {wrong[0]!r} is not @ block with positions all, as everything in this folder")
    return plan


FORMAT = Format(
    name="hf-steered",
    holds="a whole model with steering @ block of any kind; all else is merged into its weights",
    programs="transformers and vLLM, with trust_remote_code",
    recognises=lambda path: is_folder(path, KIND),
    read=read,
    whole=True,
    refuse=refuse,
    reduce=reduce,
    write=write,
    options=("dtype",),
    verify="transformers",
    use=Use(
        "transformers",
        "finetune",
        """\
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto", trust_remote_code=True)""",
        tags=("custom_code",),
        needs="The folder has code of its own, which computes the steering: without it, loading fails.",
    ),
)
