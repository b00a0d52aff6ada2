"""`export` and `load`: steered models to and from the formats in `FORMATS`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxsteer.io import source as sources
from jaxsteer.io.files import Json, check_free, new_folder, write_text
from jaxsteer.io.formats import FORMATS, find_format, find_writable
from jaxsteer.io.formats.card import model_card
from jaxsteer.io.formats.format import Format, Given, WriteOptions, unused
from jaxsteer.io.formats.sidecar import Sidecar, check_base, read_sidecar, restore, write_sidecar
from jaxsteer.io.formats.verdict import Verdict, judge, probe_tokens, unlike
from jaxsteer.io.load import LoadedModel, load_model
from jaxsteer.io.provenance import BaseOptions
from jaxsteer.io.steered import SteeredModel
from jaxsteer.io.steering_file import check_steering
from jaxsteer.models.families import FAMILIES
from jaxsteer.models.quantise import is_quantised
from jaxsteer.plans import validate_plan
from jaxsteer.types import Plan

HUB_FILES = (
    *("*.json", "*.safetensors", "*.gguf", *sources.TOKENIZER),
    *("intkey_*.bin", "adapter_steerer.pt", "adapter_model.bin", "pytorch_adapter.bin"),
)
"""What is downloaded of a repository of the Hugging Face Hub; of pickles only those of steering."""


def check_options(to: str, options: WriteOptions) -> None:
    """Refuse options that a format has no use for, and a missing folder in `over`; it needs no plan and no model.

    Raises:
        ValueError: such an option, or a format that there is not, or that is only read.
    """
    format = find_writable(to)
    for option in unused(options, format.options):
        users = [name for name, row in FORMATS.items() if option.removeprefix("--") in row.options]
        raise ValueError(f"{option}: {to} has no use for it; leave it out ({option} is for --to {', '.join(users)})")
    if "over" in format.options and options.over is None:
        raise ValueError(
            "--over FOLDER is missing: the steerable base that this is for, written with --to hf-steerable"
        )
    if options.over is not None and not options.over.is_dir():
        raise ValueError(f"--over {options.over}: no such folder; write it with --to hf-steerable")


def check_given(format: Format, given: Given) -> None:
    """Refuse what the person says of files that say it themselves, or in which it means nothing.

    Raises:
        ValueError: it would not be used.
    """
    if said := unused(given, format.asks):
        asked = ", ".join(f"--{name}" for name in format.asks) or "nothing"
        raise ValueError(
            f"{', '.join(said)}: has no meaning for the format {format.name}, whose files leave {asked} to you; leave "
            "it out"
        )


def check_export(to: str, plan: Plan, loaded: LoadedModel, options: WriteOptions | None = None) -> None:
    """Refuse what a format cannot hold; it needs no weights, see `jaxsteer.io.describe_model`.

    Args:
        to: the format's name.
        plan: of the steering.
        loaded: the base model, or its description.
        options: how to write.

    Raises:
        ValueError: no such format, one that is only read, or a plan that it cannot hold: every slot with the reason
            and the nearest alternative.
    """
    options = options or WriteOptions()
    check_options(to, options)
    format, config = FORMATS[to], loaded.config
    assert format.refuse is not None
    validate_plan(plan, config)
    if is_quantised(loaded.base):
        raise ValueError(
            f"{to}: the base model is in int8, which no format here holds; export it over the float weights "
            "(load_model without `quantised`; --float-base), and the verdict says what the difference means"
        )
    if reasons := format.refuse(plan, FAMILIES[loaded.family], config, options):
        raise ValueError(f"{to} cannot hold this plan:\n" + "\n".join(f"  {reason}" for reason in reasons))


def export(
    steered: SteeredModel,
    to: str,
    folder: str | Path,
    options: WriteOptions | None = None,
    *,
    tokens: np.ndarray | None = None,
    reference: SteeredModel | None = None,
) -> Verdict:
    """Write a steered model in another program's format, read it again, and say how exact it is.

    The folder appears under its name only when it is complete; jaxsteer.json in it has the verdict, the plan, and what
    is known of the base model.

    Args:
        steered: the base model and its steering.
        to: the format's name, see `FORMATS`.
        folder: the output folder; it must not exist, or be empty.
        options: how to write.
        tokens: int32 [B, T], the batch on which the result is compared; by default ids at random.
        reference: what it is compared with, if not `steered` itself: the int8 base that the steering was trained on.

    Returns:
        How far the model in the files is from the exported one, or from `reference`.

    Raises:
        ValueError: the format cannot hold the plan (see `check_export`), or the folder is not empty.
        RuntimeError: what was read again is not what was written; nothing is left at `folder`.
    """
    options, format = options or WriteOptions(), find_format(to)
    check_free(Path(folder))
    check_export(to, steered.plan, steered.loaded, options)
    check_steering(steered.steering, steered.plan, steered.loaded.config, to)
    tokens = _checked(tokens, steered.loaded.config.vocab_size)
    assert format.reduce is not None
    assert format.write is not None
    reduced = format.reduce(steered, options)
    if format.unsteered:
        steered = replace(steered, plan=(), steering={})
    with new_folder(folder) as partial:
        format.write(reduced, partial, options)
        read = format.read(partial, None if format.whole else steered.loaded, Given())
        _check_read(reduced, read, format)
        restored = restore(steered.plan, read) if steered.plan else steered
        verbatim = steered.plan == restored.plan and not unlike(steered.steering, restored.steering)
        changed = [] if verbatim else [_lost(steered.plan, read.plan, restored.plan, format)]
        verdict = judge(reference or steered, read, tokens, verbatim=verbatim)
        verdict = replace(verdict, lost=tuple(dict.fromkeys([*reduced.lost, *changed])))
        describe(partial, steered, to, verdict)
    return verdict


def _checked(tokens: np.ndarray | None, vocab_size: int) -> np.ndarray:
    """The probe, by default one at random.

    Raises:
        ValueError: not token ids [B, T] of the model.
    """
    if tokens is None:
        return probe_tokens(vocab_size)
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not tokens.size or tokens.dtype.kind not in "iu":
        raise ValueError(f"tokens: expected integers [B, T], got {tokens.dtype} {list(tokens.shape)}")
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise ValueError(f"tokens: {tokens.min()} to {tokens.max()}; the model has 0 to {vocab_size - 1}")
    return tokens


def describe(folder: Path, steered: SteeredModel, to: str, verdict: Verdict, peers: Sequence[Json] = ()) -> None:
    """Write README.md, the model card, and jaxsteer.json into an export whose other files are complete.

    Args:
        folder: the export.
        steered: what was exported.
        to: the format's name.
        verdict: how exact it is.
        peers: what other programs answered, see `train.peers.verify`.
    """
    steered = replace(steered, lost=verdict.lost)
    measured = verdict.to_json() | ({"peers": list(peers)} if peers else {})
    write_text(folder / "README.md", model_card(steered, to, measured))
    write_sidecar(folder, to, steered, measured)


def _check_read(reduced: SteeredModel, read: SteeredModel, format: Format) -> None:
    """Compare what was read again with what was to be written, leaf by leaf."""
    problems = unlike(reduced.steering, read.steering)
    if format.whole:
        problems += unlike(reduced.base, read.base)
    if problems:
        raise RuntimeError(f"{format.name}: what was read again is not what was written: {'; '.join(problems[:5])}")


def _lost(plan: Plan, read: Plan, restored: Plan, format: Format) -> str:
    """What the files hold instead of the slots that they do not hold as they were, a sentence."""
    changed = [slot.name for slot in plan if slot not in read] or [slot.name for slot in plan]
    slots = f"{'slots' if len(changed) > 1 else 'slot'} {', '.join(changed)}"
    if format.whole:
        return f"{slots}: merged into the weights, and cannot be taken out again"
    if restored == plan:
        return f"{slots}: some values come back rounded"
    return f"{slots}: stored in another form, as {', '.join(slot.name for slot in read)}"


@dataclass(frozen=True)
class Source:
    """A file or folder of steering, before its base model is loaded.

    path     where it is
    format   that it is in
    base     where its base model can be loaded from, if its files say so
    sidecar  the content of its jaxsteer.json, if it has one
    """

    path: Path
    format: Format
    base: str | None
    sidecar: Sidecar | None


def recognise(source: str | Path, format: str | None = None) -> Source:
    """Find out what a file, folder, hub id or named model is.

    Args:
        source: where it is.
        format: its format, if the person says so.

    Raises:
        ValueError: nothing is there, or it is in no format that is read here.
    """
    path = Path(source).expanduser()
    if not path.exists():
        path = sources.locate(source, HUB_FILES)
    sidecar = read_sidecar(path)
    if format is not None:
        known = find_format(format)
    else:
        known_names = [name for name, row in FORMATS.items() if row.recognises(path)]
        if not known_names:
            inside = path.is_file() and any(row.recognises(path.parent) for row in FORMATS.values())
            hint = f"; give its folder, {path.parent}" if inside else ""
            raise ValueError(f"{source}: in none of the formats that are read here ({', '.join(FORMATS)}){hint}")
        # What was exported says so itself: other files may lie beside it.
        own = sidecar.format if sidecar is not None else ""
        known = FORMATS[own if own in known_names else known_names[0]]
    base = known.base(path) if known.base is not None else None
    return Source(path, known, base or (sidecar.source if sidecar else None), sidecar)


def load(
    source: str | Path | Source,
    model: str | Path | LoadedModel | None = None,
    *,
    given: Given | None = None,
    dtype: DTypeLike = jnp.float32,
    other_base: bool = False,
) -> SteeredModel:
    """Load a model with its steering from any format that is read here, ready for `forward`.

        steered = jaxsteer.load("runs/listops/steering.safetensors")
        forward(steered.model, steered.base, steered.steering, batch)

    Args:
        source: a steering file, a folder or file of another program (see `FORMATS`), a plain model, or the id of one
            of these on the Hugging Face Hub.
        model: the base model; by default the one that the files name. Whole models need none.
        given: what the files do not say, such as alpha and activation; all that is missing is asked for at once.
        dtype: of the base model's weights.
        other_base: accept a base model of the same config whose weights are others.

    Raises:
        ValueError: nothing is there, the files are damaged or of an unknown kind, they do not say enough, or they were
            made for another base model.
    """
    found = source if isinstance(source, Source) else recognise(source)
    given = given or Given()
    check_given(found.format, given)
    loaded = None if found.format.whole else _base(found, model, dtype)
    if loaded is not None and found.format.check is not None:
        found.format.check(found.path, loaded, other_base)
    steered = found.format.read(found.path, loaded, given)
    if loaded is not None:
        named = None if isinstance(model, LoadedModel) else model
        steered = replace(steered, source=str(named or found.base or loaded.name))
    validate_plan(steered.plan, steered.loaded.config)
    if found.sidecar is None:
        return steered
    where = str(found.path)
    if not found.format.whole:
        check_base(found.sidecar, steered, where, other_base=other_base)
    steered = replace(steered, notes=found.sidecar.notes, lost=found.sidecar.lost)
    return restore(found.sidecar.plan, steered) if found.sidecar.plan else steered


def _base(found: Source, model: str | Path | LoadedModel | None, dtype: DTypeLike) -> LoadedModel:
    """The base model of steering: as given, else as its files say, and as it was in training.

    Raises:
        ValueError: neither.
    """
    if isinstance(model, LoadedModel):
        return model
    name = model or found.base
    if not name:
        raise ValueError(
            f"{found.path}: does not say which model it is for; name the base model (`model` in Python, --model)"
        )
    row = found.format
    options = BaseOptions() if row.base_options is None else row.base_options(found.path)
    try:
        return load_model(name, dtype=dtype, **options._asdict())
    except ValueError as error:
        if model:
            raise
        raise ValueError(f"{found.path}: made for {name}, which cannot be loaded ({error}); give --model") from None
