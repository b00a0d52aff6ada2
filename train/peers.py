"""Ask the programs that an export is for what they make of it: transformers, peft, vLLM, llama.cpp and adapters.

Each has a program of its own in tests/peers (in `train/peer_programs` where jaxsteer is installed), which runs in the
peer's environment, made by `make peers`, and talks JSON. Nothing of theirs is imported here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxsteer.batches import make_batch
from jaxsteer.inference.generate import generate
from jaxsteer.io.files import Json, parse_json
from jaxsteer.io.formats.verdict import logits
from jaxsteer.io.steered import SteeredModel
from train.devices import interrupts

_HERE = Path(__file__).resolve().parent
_IN_CLONE = _HERE.parent / "tests" / "peers"
PROGRAMS = next((f for f in (_HERE / "peer_programs", _IN_CLONE) if f.is_dir()), _IN_CLONE)
"""The programs NAME_peer.py: in this package where it is installed, among the tests in a clone."""

ENVIRONMENTS = _HERE.parent / ".peers"
"""Where `make peers` makes the environments, in a clone."""

ENVIRONMENT_OF = {"peft": "hf", "transformers": "hf", "accelerator": "hf"}
"""The environment of a peer that has none of its own name."""

TIMEOUT = 1800
"""Seconds after which a peer is stopped."""

LINES = 3
"""Lines of a peer's standard error that are told when it fails."""

ROWS = 8
"""Rows of a probe that our own forward takes at a time."""


@dataclass(frozen=True, eq=False)
class Probe:
    """What our own forward says of some tokens.

    tokens     int [B, T]
    logits     fp32 [B, T, V]
    generated  int [B, M], greedy continuations, which no stop token ends
    margins    fp32 [B, M], how far the logit of each generated token is above the next best
    """

    tokens: np.ndarray
    logits: np.ndarray
    generated: np.ndarray
    margins: np.ndarray


@dataclass(frozen=True, eq=False)
class Answer:
    """What a peer says of the same tokens.

    versions   of its packages
    kind       what `values` are: "logits" or "logprobs"
    values     fp32 [B, T, V]
    generated  int [B, M]
    said       the whole answer, as JSON
    """

    versions: dict[str, str]
    kind: str
    values: np.ndarray
    generated: np.ndarray
    said: Mapping[str, Any]


def probe(steered: SteeredModel, tokens: np.ndarray, new_tokens: int = 0) -> Probe:
    """Logits at some tokens, and greedy continuations, by our own forward.

    Args:
        steered: the model.
        tokens: int [B, T].
        new_tokens: M, the number of tokens to generate after each row.
    """
    count, length = tokens.shape
    rows = min(count, ROWS)
    whole = np.resize(tokens, (-(-count // rows) * rows, length))  # filled up with its first rows: one program for all
    parts = [_probe_rows(steered, whole[at : at + rows], new_tokens) for at in range(0, len(whole), rows)]
    return Probe(tokens, *(np.concatenate(part)[:count] for part in zip(*parts, strict=True)))


def _probe_rows(steered: SteeredModel, tokens: np.ndarray, new_tokens: int) -> tuple[np.ndarray, ...]:
    """Logits, continuations and margins of a few rows."""
    network, length = steered.network, tokens.shape[1]
    generated = np.zeros((len(tokens), 0), np.int32)
    if new_tokens:
        prompts = make_batch(jnp.asarray(tokens))
        made = generate(
            network.model, network.base, network.steering, prompts, max_new_tokens=new_tokens, stop_tokens=()
        )
        generated = np.asarray(made.tokens)
    whole = jnp.concatenate([tokens, generated], axis=1)
    completion = jnp.broadcast_to(jnp.arange(whole.shape[1]) >= length, whole.shape)
    found = np.asarray(logits(network, make_batch(whole, completion=completion)))
    best = np.partition(found[:, length - 1 : length - 1 + new_tokens], -2, axis=-1)
    return found[:, :length], generated, best[..., -1] - best[..., -2]


def verify(
    program: str,
    folder: Path,
    ours: Probe,
    *,
    base: Path | None = None,
    python: Path | None = None,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Ask a peer for logits and continuations of our probe's tokens, and compare.

    Args:
        program: name of the peer, such as "vllm".
        folder: the export.
        ours: what our own forward says.
        base: folder or file of the base model, for exports that do not hold it.
        python: the interpreter that has the peer's packages; None = that of its environment.
        dtype: of the peer's weights and compute, float32 or bfloat16.

    Returns:
        As JSON: what answered (peer, versions, dtype), what was compared ("logits" or "logprobs"), and the figures of
        `compare_values` and `compare_generated`.

    Raises:
        ValueError: see `run_peer`; or the answer is not that of this model, such as other shapes or NaN.
    """
    request = {"path": str(Path(folder).absolute()), "base": None if base is None else str(Path(base).absolute())}
    request |= {"tokens": ours.tokens.tolist(), "generate": ours.generated.shape[1], "dtype": dtype}
    theirs = run_peer(program, request, python)
    if theirs.values.shape != ours.logits.shape or theirs.generated.shape != ours.generated.shape:
        raise ValueError(
            f"{program}: answered with {theirs.kind} {list(theirs.values.shape)} and tokens "
            f"{list(theirs.generated.shape)}; this model has {list(ours.logits.shape)} and "
            f"{list(ours.generated.shape)}. Is {folder} an export of it?"
        )
    made = {"peer": program, "versions": theirs.versions, "dtype": dtype, "compared": theirs.kind}
    return made | compare_values(ours, theirs, program) | compare_generated(ours, theirs)


def compare_values(ours: Probe, theirs: Answer, program: str) -> dict[str, Any]:
    """How far logits or log-probabilities are from ours.

    Returns:
        positions           B·T
        largest_difference  over all positions and the whole vocabulary
        mean_difference     over the same
        top1_agreement      share of positions where the most likely token is the same

    Raises:
        ValueError: a difference is not finite.
    """
    largest, means, agreeing = 0.0, [], 0
    for row, (mine, other) in enumerate(zip(ours.logits, theirs.values, strict=True)):  # one at a time: they are large
        difference = np.abs((mine if theirs.kind == "logits" else _log_softmax(mine)) - other.astype(np.float64))
        if not np.isfinite(difference).all():
            raise ValueError(f"{program}: its {theirs.kind}, or our logits, are not finite in row {row} of the probe")
        largest = max(largest, float(difference.max()))
        means.append(float(difference.mean()))
        agreeing += int(np.sum(mine.argmax(-1) == other.argmax(-1)))
    return {
        "positions": ours.tokens.size,
        "largest_difference": largest,
        "mean_difference": float(np.mean(means)),
        "top1_agreement": agreeing / ours.tokens.size,
    }


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logarithms of the softmax over the last axis, fp64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def compare_generated(ours: Probe, theirs: Answer) -> dict[str, Any]:
    """How many greedy tokens are the same. After the first that differs, the rest are of different texts.

    Returns:
        answers                   B
        answers_agreeing          those of which all M tokens are the same
        generated                 B·M
        generated_agreeing        tokens before the first that differs
        largest_diverging_margin  of our margins at such a first token; None if all agree

        {} if M is 0.
    """
    rows, new_tokens = ours.generated.shape
    if not new_tokens:
        return {}
    same = np.cumprod(ours.generated == theirs.generated, axis=1).sum(axis=1)
    margins = [float(ours.margins[row, first]) for row, first in enumerate(same) if first < new_tokens]
    return {
        "answers": rows,
        "answers_agreeing": rows - len(margins),
        "generated": rows * new_tokens,
        "generated_agreeing": int(same.sum()),
        "largest_diverging_margin": max(margins, default=None),
    }


def run_peer(
    program: str, request: Mapping[str, Any], python: Path | None = None, *, timeout: float = TIMEOUT
) -> Answer:
    """Run a peer's program.

    Args:
        program: name of the peer, such as "vllm".
        request: what it is asked, as JSON: path, base, tokens, generate, dtype. Paths are absolute.
        python: the interpreter that has the peer's packages; None = that of its environment.
        timeout: seconds after which it is stopped, with all processes that it started.

    Raises:
        ValueError: there is no such program or interpreter, a package is missing, it failed, took too long, or gave no
            answer; the message ends with the last lines that it wrote to standard error.
    """
    with temporary_folder("jaxsteer-peer-") as folder:
        out = Path(folder) / "values.npy"
        said = ask_peer(program, {**request, "out": str(out)}, python, timeout=timeout)
        return _answer(said, out, program)


def ask_peer(program: str, request: Mapping[str, Any], python: Path | None = None, *, timeout: float = TIMEOUT) -> Json:
    """Run a peer's program, and read the JSON in the last line that it prints.

    Args:
        program: name of the peer, such as "vllm".
        request: what it is asked, as JSON. Paths are absolute.
        python: the interpreter that has the peer's packages; None = that of its environment.
        timeout: seconds after which it is stopped, with all processes that it started.

    Raises:
        TookTooLong: it was stopped.
        ValueError: as `run_peer`.
    """
    files = PROGRAMS.glob("*_peer.py")
    programs = {file.stem.removesuffix("_peer"): file for file in sorted(files) if not file.match("test_*")}
    if program not in programs:
        raise ValueError(f"{program}: no peer of this name; there are {', '.join(programs) or 'none here'}")
    interpreter = interpreter_of(program, python)
    environment = dict(os.environ)
    if interpreter != Path(sys.executable):  # neither this clone nor this environment is to be seen there
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    command = [str(interpreter), str(programs[program])]
    with temporary_folder("jaxsteer-peer-") as folder:
        printed = run_program(
            command, json.dumps(request), name=program, timeout=timeout, folder=folder, environment=environment
        )
    last = next((line for line in reversed(printed.splitlines()) if line.strip()), "")
    return parse_json(last, f"{program}: the last line that it printed")


@contextmanager
def temporary_folder(prefix: str) -> Iterator[str]:
    """A temporary folder that is deleted at the end, by Ctrl-C too."""
    with (
        tempfile.TemporaryDirectory(prefix=prefix) as folder,
        interrupts.undoing(lambda: shutil.rmtree(folder, ignore_errors=True)),
    ):
        yield folder


def interpreter_of(program: str, python: Path | None) -> Path:
    """The Python that runs a peer: as given, or that of its environment.

    Raises:
        ValueError: there is none.
    """
    # Not resolved: the link in an environment is what tells Python where it is.
    path = (
        ENVIRONMENTS / ENVIRONMENT_OF.get(program, program) / "bin" / "python" if python is None else python.absolute()
    )
    if not path.is_file():
        raise ValueError(f"{program}: there is no Python at {path}; {_how_to_install(program)}")
    return path


def _how_to_install(program: str) -> str:
    return (
        f"make the environment of {ENVIRONMENT_OF.get(program, program)} with `make peers` in a clone of jaxsteer, or "
        "give the Python of one that has its packages: --peer-python PATH"
    )


class TookTooLong(ValueError):
    """A program was stopped because it gave no answer in time."""


def run_program(
    command: Sequence[str],
    text: str,
    *,
    name: str,
    timeout: float | None,
    folder: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Run a command with a text on standard input, and return what it prints.

    Args:
        command: the program and its arguments.
        text: for its standard input.
        name: what messages call it.
        timeout: seconds after which it is stopped, with all processes that it started; None = never.
        folder: to run in; None = this process's.
        environment: its environment variables; None = this process's.

    Raises:
        TookTooLong: it was stopped.
        ValueError: it cannot be run, or failed; the message ends with the last lines that it wrote to standard error.
    """
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, cwd=folder, env=environment, start_new_session=True
        )
    except OSError as error:
        raise ValueError(f"{name}: {command[0]} cannot be run ({error.strerror})") from None
    try:
        with interrupts.undoing(lambda: os.killpg(process.pid, signal.SIGKILL)):
            printed, complaint = process.communicate(text.encode(), timeout)
    except subprocess.TimeoutExpired:
        raise TookTooLong(f"{name}: no answer within {timeout:g} seconds, so it was stopped") from None
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode:
        raise ValueError(_failure(name, process.returncode, complaint.decode(errors="replace")))
    return printed.decode(errors="replace")


def _failure(program: str, status: int, complaint: str) -> str:
    """Why a peer failed: a package that it lacks, or its own last lines."""
    if missing := re.search(r"No module named '([\w.]+)'", complaint):
        return f"{program}: its Python does not have the package {missing[1]}; {_how_to_install(program)}"
    lines = [line.strip() for line in complaint.splitlines() if line.strip()][-LINES:]
    how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"failed with status {status}"
    return f"{program}: {how}: {' | '.join(lines) or 'it said nothing'}"


def _answer(said: Json, out: Path, program: str) -> Answer:
    """A peer's answer: the JSON that it printed, and the array in its file."""
    versions = said.get("versions") if isinstance(said, dict) else None
    if not isinstance(versions, dict) or said.get("kind") not in ("logits", "logprobs"):
        raise ValueError(
            f"{program}: expected an answer with versions and a kind (logits, logprobs), got {str(said)[:200]!r}"
        )
    try:
        values = np.array(np.load(out, mmap_mode="r", allow_pickle=False))
        rows = said.get("generated") or [[]] * len(values)
        generated = np.array(rows) if any(rows) else np.zeros((len(rows), 0), np.int32)
    except (OSError, EOFError, ValueError, TypeError) as error:
        raise ValueError(f"{program}: its answer cannot be read ({error})") from None
    if values.dtype != np.float32 or values.ndim != 3 or generated.dtype.kind != "i" or generated.ndim != 2:
        raise ValueError(
            f"{program}: expected float32 [rows, tokens, vocabulary] and rows of new tokens, all of one length; got "
            f"{values.dtype} {list(values.shape)} and {generated.dtype} {list(generated.shape)}"
        )
    versions = {str(name): str(version) for name, version in versions.items()}
    return Answer(versions, said["kind"], values, generated, said)
