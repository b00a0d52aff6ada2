"""Take steering to other programs, and bring theirs here: `python -m train.convert SOURCE --to FORMAT --out FOLDER`.

SOURCE is a steering file or a run's folder, or a folder or file of another program: peft, pyreft, llama.cpp and the
others that `--list` shows. What its files do not say, such as alpha or the base model, is asked for. The result is read
again and compared with the original: leaf by leaf, and by the logits of both on a text. --verify asks the program that
the format is for, too (see `make peers`). jaxsteer.json beside the files has the verdict, README.md says how to load
them.
"""

from __future__ import annotations

import codecs
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
import tyro
from rich.table import Table

from jaxsteer.batches import make_batch
from jaxsteer.interventions import LoRA
from jaxsteer.io import LoadedModel
from jaxsteer.io.files import check_free, partial_of, read_json
from jaxsteer.io.formats import FORMATS, Given, WriteOptions
from jaxsteer.io.formats.convert import (
    Source,
    check_export,
    check_given,
    check_options,
    describe,
    export,
    load,
    recognise,
)
from jaxsteer.io.formats.updates import refuse_lora
from jaxsteer.io.formats.verdict import PROBE_ROWS, probe_tokens
from jaxsteer.io.push import check_push, push
from jaxsteer.io.steered import SteeredModel
from jaxsteer.models.config import ModelConfig
from jaxsteer.theory import to_lora
from jaxsteer.types import Plan, Slot
from train import base_models, peers
from train.cli import run_main
from train.devices import interrupts
from train.display.console import get_console, progress, say

LENGTH, NEW_TOKENS = 128, 16
"""Tokens in a row of text, and greedy tokens that a peer is asked for."""

LEAST_ROWS, MOST_ROWS, FIT_BATCH = 4, 64, 16
"""Rows of text to which a LoRA is fitted: at least, at most, and at a time."""

TEXT = 4 << 20
"""Bytes of a text that are read."""

NEUTRAL = Path(__file__).with_name("neutral.txt")


@dataclass(frozen=True)
class ConvertConfig:
    """Convert steering between formats."""

    source: Annotated[str, tyro.conf.Positional] = ""
    """A steering file, a run's folder, a file or folder in one of the formats of --list, or a Hugging Face id."""
    to: str = "jaxsteer"
    """Format to write, see --list; jaxsteer: a steering file."""
    out: str = ""
    """Folder for the result; it must not exist, or be empty."""
    list: bool = False
    """Show the formats, and do nothing else."""
    source_format: str | None = None
    """Format of SOURCE; by default it is recognised."""
    model: str | None = None
    """Base model; by default the one that SOURCE names."""
    other_base: bool = False
    """Accept a base model of the same shape whose weights are not those that the steering was trained on."""
    float_base: bool = False
    """Export steering that was trained on an int8 base for the float weights."""
    dtype: str | None = None
    """Type of a whole model's weights: float32, bfloat16 or float16; in GGUF files F32, F16, BF16, Q8_0, Q4_0, Q4_1,
    Q5_0 or Q5_1. By default as they are loaded."""
    rank: int | None = None
    """Rank of the steering layers in a steerable base (--to hf-steerable); by default the plan's."""
    over: str | None = None
    """Folder of the steerable base that an adapter is for (--to vllm)."""
    name: str = "jaxsteer"
    """Name of the adapter, in formats that have one."""
    alpha: float | None = None
    """Factor of the shift, if SOURCE does not say it."""
    activation: str | None = None
    """Activation of low-rank steering, if SOURCE does not say it: none, silu, relu, gelu or tanh."""
    positions: str | None = None
    """Which tokens are steered, if SOURCE does not say it: all, prompt, completion, last, first:n+last:n."""
    feature: int | None = None
    """Feature of a sparse autoencoder to steer along."""
    strength: float | None = None
    """Factor of a vector, where SOURCE does not store its scale."""
    fit_lora: int | None = None
    """Fit a LoRA of this rank on mlp.down to the slots that LoRA cannot express, and write it in their place; the
    verdict says how near it comes."""
    text: str | None = None
    """Text on whose beginning the result is compared, and to whose rest a LoRA is fitted; best of the kind that the
    model will see, and of some thousand tokens. By default a neutral one."""
    verify: bool = False
    """Load the result with the program that it is for, and compare its logits and greedy tokens with ours."""
    peer_python: str | None = None
    """Python of an environment with that program; by default the one that `make peers` made."""
    push: str | None = None
    """Repository of the Hugging Face Hub to upload the result to (owner/name); it is created if it does not exist."""
    private: bool = False
    """Create that repository as a private one."""

    def check(self) -> None:
        """Refuse what needs neither files nor weights to be refused."""
        if not self.source:
            raise ValueError("SOURCE: which file or folder? See --help, and --list for the formats")
        if not self.out:
            raise ValueError(f"--out: name a folder for the result (--to {self.to})")
        check_options(self.to, self.options)
        check_free(Path(self.out))
        _ = self.given
        if self.text is not None:
            read_text(Path(self.text))
        if self.fit_lora is not None and self.fit_lora < 1:
            raise ValueError(f"--fit-lora {self.fit_lora}: expected a rank, from 1 on")
        if self.verify:
            self.check_peer()
        if self.push is not None:
            check_push(self.push)

    def check_peer(self) -> None:
        """Refuse --verify where no program can answer."""
        program = FORMATS[self.to].verify
        if program is None:
            known = ", ".join(name for name, row in FORMATS.items() if row.verify)
            raise ValueError(f"--verify: no program to ask is known for {self.to}; those with one are {known}")
        peers.interpreter_of(program, None if self.peer_python is None else Path(self.peer_python))

    @property
    def options(self) -> WriteOptions:
        """How to write."""
        over = Path(self.over) if self.over else None
        return WriteOptions(dtype=self.dtype, rank=self.rank, over=over, name=self.name)

    @property
    def given(self) -> Given:
        """What SOURCE does not say."""
        return Given(self.alpha, self.activation, self.positions, self.feature, self.strength)


def show_formats() -> None:
    """Print what is read and written."""
    table = Table(title="formats", title_justify="left")
    for column in ("format", "holds", "used by", "read", "written"):
        table.add_column(column)
    for name, row in FORMATS.items():
        table.add_row(name, row.holds, row.programs, "yes", "yes" if row.writable else "no")
    get_console().print(table)


def convert(config: ConvertConfig) -> None:
    """Read, write, compare, and report."""
    config.check()
    found = _recognise(base_models.resolve_model(config.source), config)
    check_given(found.format, config.given)
    say(f"{found.path}: {found.format.name}, {found.format.holds}")
    steered, reference = read_trained(found, config) if found.format.name == "jaxsteer" else (read(found, config), None)
    rows = rows_of_text(steered.loaded, config)
    tokens, rest = rows[:PROBE_ROWS], rows[PROBE_ROWS : PROBE_ROWS + MOST_ROWS]
    if config.fit_lora is not None:
        reference = reference or steered
        steered = with_fitted_lora(steered, rest, config.fit_lora)
    say(f"Writing {config.out}, and comparing it with the original ...")
    with interrupts.undoing(lambda: shutil.rmtree(partial_of(config.out), ignore_errors=True)):
        verdict = export(steered, config.to, config.out, config.options, tokens=tokens, reference=reference)
    print(f"{config.to}: {config.out}")
    for path in sorted(Path(config.out).iterdir()):
        print(f"  {path.name:32} {path.stat().st_size:>14,} bytes")
    print(verdict)
    for sentence in verdict.lost:
        print(f"not in the files: {sentence}")
    if config.verify:
        answer = verify(config, steered, tokens)
        describe(Path(config.out), steered, config.to, verdict, [answer])
        print(show_answer(answer))
    if config.push:
        print(f"uploaded: {push(config.out, config.push, private=config.private)}")


def _recognise(source: str | Path, config: ConvertConfig) -> Source:
    """What SOURCE is.

    Raises:
        ValueError: see `recognise`; of a run's folder without steering, why it has none.
    """
    try:
        return recognise(source, config.source_format)
    except ValueError:
        folder = Path(source)
        if config.source_format is None and (folder / "model" / "config.json").is_file():
            raise ValueError(f"{folder}: this run trained the model itself; give {folder / 'model'}") from None
        if config.source_format is None and (folder / "checkpoints").is_dir():
            raise ValueError(
                f"{folder}: the run has not finished; continue it with --resume, or give another"
            ) from None
        raise


def verify(config: ConvertConfig, steered: SteeredModel, tokens: np.ndarray) -> dict[str, Any]:
    """What the program that the export is for makes of it, compared with what we make of it."""
    row, out = FORMATS[config.to], Path(config.out)
    assert row.verify is not None
    python = None if config.peer_python is None else Path(config.peer_python)
    exported = load(out, None if row.whole else steered.loaded)
    ours = peers.probe(exported, tokens, NEW_TOKENS)
    say(f"Asking {row.verify} ...")
    with peers.temporary_folder("jaxsteer-base-") as folder:
        base = None if config.over is None else Path(config.over)
        if row.over is not None:
            base = Path(folder)
            write_base(steered.loaded, row.over, base)
        return peers.verify(row.verify, out, ours, base=base, python=python)


def write_base(loaded: LoadedModel, to: str, folder: Path) -> None:
    """Write a model as it is, for a program that needs it beside an adapter."""
    row, options = FORMATS[to], WriteOptions()
    assert row.reduce is not None
    assert row.write is not None
    row.write(row.reduce(SteeredModel(loaded), options), folder, options)


def show_answer(answer: Mapping[str, Any]) -> str:
    """A peer's answer in a sentence."""
    versions = ", ".join(f"{name} {version}" for name, version in answer["versions"].items())
    return (
        f"{versions}: {answer['compared']} differ from ours by at most {answer['largest_difference']:.1e}, "
        f"{answer['generated_agreeing']} of {answer['generated']} greedy tokens are the same"
    )


def read_trained(found: Source, config: ConvertConfig) -> tuple[SteeredModel, SteeredModel | None]:
    """A steering file on its base, and on the int8 base that it was trained on, if it was.

    What can be refused without weights is refused before they are read.
    """
    file = base_models.read_steered(str(found.path))
    assert file is not None
    name = base_models.find_base(file, config.model)
    quantised, tokenizer = file.base_options
    if quantised and not config.float_base:
        raise ValueError(
            f"{file.path}: trained on an int8 base, which no format here holds; --float-base writes it for the float "
            "weights and says what the difference means"
        )
    base_models.check_base(file, name, other_base=config.other_base)
    described = base_models.describe(name, tokenizer=tokenizer)
    plan = file.plan
    if config.fit_lora is not None:
        fitted = Slot("fitted", LoRA(rank=config.fit_lora), ("mlp.down",))
        plan = (*slots_of_lora(plan, described.config), fitted)
    check_export(config.to, plan, described, config.options)
    notes = file.notes | result_beside(file.path)
    on = lambda loaded: SteeredModel(loaded, file.plan, file.steering, name, notes)
    rows_of_text(described, config)
    steered = on(base_models.load(name, tokenizer=tokenizer))
    if not quantised:
        return steered, None
    lost = ["it was trained on an int8 base, and is written for the float weights"]
    return replace(steered, lost=lost), on(base_models.load(name, quantised=True, tokenizer=tokenizer))


def result_beside(path: Path) -> dict[str, Any]:
    """The accuracy before and after of the run that a steering file lies in, as notes; {} if there is none."""
    summary = path.with_name("summary.json")
    if not summary.is_file():
        return {}
    figures = read_json(summary)
    result = {name: figures[name] for name in ("accuracy_before", "accuracy_after") if figures.get(name)}
    return {"result": result} if result else {}


def read(found: Source, config: ConvertConfig) -> SteeredModel:
    """The steered model in the files of another program."""
    if found.format.whole:
        return load(found, given=config.given)
    name = config.model or found.base
    if name is None:
        raise ValueError(f"{found.path}: does not say which model it is for; name the base model: --model")
    try:
        described = base_models.describe(name)
    except ValueError as error:
        if config.model is not None:
            raise
        raise ValueError(f"{found.path}: made for {name}, which cannot be loaded ({error}); give --model") from None
    rows_of_text(described, config)
    steered = load(found, base_models.load(name), given=config.given, other_base=config.other_base)
    return replace(steered, source=name)


def read_text(path: Path) -> str:
    """The first TEXT bytes of a text file.

    Raises:
        ValueError: no such file, or not UTF-8.
    """
    if not path.is_file():
        raise ValueError(f"--text {path}: no such file")
    with path.open("rb") as file:
        data = file.read(TEXT)
    try:
        # The end may have cut a character.
        return codecs.getincrementaldecoder("utf-8")().decode(data, final=len(data) < TEXT)
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {path}: not UTF-8 ({error.reason} at byte {error.start})") from None


def rows_of_text(loaded: LoadedModel, config: ConvertConfig) -> np.ndarray:
    """Token ids [B, LENGTH] of the text: PROBE_ROWS to compare on, and the rest to fit to.

    Without a tokenizer they are at random, and there is nothing to fit to.

    Raises:
        ValueError: a text that is not UTF-8, or too short.
    """
    if loaded.tokenizer is None:
        if config.fit_lora is not None:
            raise ValueError(f"--fit-lora: {loaded.name} comes without a tokenizer, so that no text can be read")
        return probe_tokens(loaded.config.vocab_size)
    path = Path(config.text or NEUTRAL)
    ids = loaded.tokenizer(read_text(path), verbose=False)["input_ids"]  # no warning: rows are short
    needed = LENGTH if config.fit_lora is None else (PROBE_ROWS + LEAST_ROWS) * LENGTH
    if len(ids) < needed:
        raise ValueError(
            f"--text {path}: {len(ids)} tokens; at least {needed} are needed"
            + ("" if config.fit_lora is None else ", to fit to others than those on which the result is compared")
        )
    return np.array(ids[: len(ids) // LENGTH * LENGTH], np.int32).reshape(-1, LENGTH)


def slots_of_lora(plan: Plan, config: ModelConfig) -> Plan:
    """The slots that LoRA expresses exactly.

    Raises:
        ValueError: it expresses all of them, or one steers some of the tokens only.
    """
    for slot in plan:
        if slot.positions.kind != "all":
            raise ValueError(
                f"--fit-lora: slot {slot.name!r} steers positions {slot.positions}, and a LoRA changes all; the "
                "text that it would be fitted to has no prompts. Fit it in Python (jaxsteer.theory.to_lora)"
            )
    kept = tuple(slot for slot in plan if not refuse_lora((slot,), config))
    if kept == plan:
        raise ValueError("--fit-lora: LoRA can express every slot of this plan exactly; leave the option out")
    return kept


def with_fitted_lora(steered: SteeredModel, rows: np.ndarray, rank: int) -> SteeredModel:
    """The model with a LoRA on mlp.down in place of the slots that are no LoRA, fitted on token ids [B, T]."""
    config = steered.loaded.config
    kept = slots_of_lora(steered.plan, config)
    base = replace(steered, plan=kept, steering={slot.name: steered.steering[slot.name] for slot in kept})
    batches = [make_batch(jnp.asarray(rows[at : at + FIT_BATCH])) for at in range(0, len(rows), FIT_BATCH)]
    with progress(config.layers, "Fitting LoRA") as bar:
        fitted = to_lora(steered.network, base.network, batches, rank, advance=lambda done: bar.update(done))
    network = fitted.network
    names = ", ".join(slot.name for slot in steered.plan if slot not in kept)
    lost = f"the slots ({names}) are approximated by a LoRA of rank {rank} on mlp.down, which was fitted to a text"
    return replace(steered, plan=network.model.plan, steering=network.steering, lost=[*steered.lost, lost])


def main() -> None:
    """Convert, or show the formats."""
    config = tyro.cli(ConvertConfig, prog="python -m train.convert", description=__doc__)
    if config.list:
        show_formats()
    else:
        convert(config)


if __name__ == "__main__":
    run_main(main)
