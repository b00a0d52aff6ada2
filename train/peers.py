"""Ask the programs that an export is for what they make of it: transformers, peft, vLLM, llama.cpp and adapters.

Each has a program of its own in tests/peers (in `train/peer_programs` where jaxsteer is installed), which runs in the
peer's environment, made by `make peers`, and talks JSON: one request (`run_peer`), or several, one a line, to a process
that keeps its model (`converse`). Nothing of theirs is imported here.
"""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import subprocess
import tempfile
import time
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
from train.devices.programs import TookTooLong, run_program, started

_HERE = Path(__file__).resolve().parent
_IN_CLONE = _HERE.parent / "tests" / "peers"
PROGRAMS = next((f for f in (_HERE / "peer_programs", _IN_CLONE) if f.is_dir()), _IN_CLONE)
"""The programs NAME_peer.py: in this package where it is installed, among the tests in a clone."""

ENVIRONMENTS = _HERE.parent / ".peers"
"""Where `make peers` makes the environments, in a clone."""

ENVIRONMENT_OF = {"accelerator": "hf", "bench": "hf", "peft": "hf", "transformers": "hf"}
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
        return _answer(ask_peer(program, {**request, "out": str(out)}, python, timeout=timeout), out, program)


def ask_peer(program: str, request: Mapping[str, Any], python: Path | None = None, *, timeout: float = TIMEOUT) -> Json:
    """Run a peer's program, and read the JSON in the last line that it prints.

    Its arguments and errors are those of `run_peer`.
    """
    command = _command(program, python)
    with temporary_folder("jaxsteer-peer-") as folder:
        printed = _run(command, json.dumps(request), folder, program, timeout)
    last = next((line for line in reversed(printed.splitlines()) if line.strip()), "")
    return parse_json(last, f"{program}: the last line that it printed")


class Conversation:
    """A peer's process that keeps its model between requests, see `converse`."""

    def __init__(self, program: str, process: subprocess.Popen, complaints: Path) -> None:
        self._program, self._process, self._complaints = program, process, complaints
        self._heard = b""

    def ask(self, op: str, *, timeout: float = TIMEOUT, **request: Any) -> dict[str, Any]:
        """The answer, a JSON object, to a request: what is to be done, and the rest of it as JSON.

        Raises:
            ValueError: as for `run_peer`.
        """
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended; reading says why
            self._process.stdin.write(json.dumps({"op": op, **request}).encode() + b"\n")
            self._process.stdin.flush()
        said = parse_json(self._line(time.monotonic() + timeout, timeout), f"{self._program}: its answer to {op!r}")
        if not isinstance(said, dict):
            raise ValueError(f"{self._program}: expected a JSON object as its answer to {op!r}, got {str(said)[:200]}")
        return said

    def _line(self, until: float, timeout: float) -> bytes:
        """The next line that it prints."""
        assert self._process.stdout is not None
        while b"\n" not in self._heard:
            if not select.select([self._process.stdout], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TookTooLong(f"{self._program}: no answer within {timeout:g} seconds, so it was stopped")
            if not (more := os.read(self._process.stdout.fileno(), 1 << 16)):
                complaint = self._complaints.read_text(errors="replace")
                raise ValueError(_failure(self._program, self._process.wait(), complaint))
            self._heard += more
        line, _, self._heard = self._heard.partition(b"\n")
        return line


@contextmanager
def converse(program: str, python: Path | None = None) -> Iterator[Conversation]:
    """Start a peer's program that answers one request a line; it is stopped when the block ends, by Ctrl-C too.

    Its arguments and errors are those of `run_peer`.
    """
    command = _command(program, python)
    with temporary_folder("jaxsteer-peer-") as folder:
        complaints = Path(folder) / "stderr"
        with complaints.open("wb") as stderr, started(command, program, stderr, folder, _elsewhere()) as process:
            yield Conversation(program, process, complaints)


def _command(program: str, python: Path | None) -> list[str]:
    """What runs a peer's program."""
    files = PROGRAMS.glob("*_peer.py")
    programs = {file.stem.removesuffix("_peer"): file for file in sorted(files) if not file.match("test_*")}
    if program not in programs:
        raise ValueError(f"{program}: no peer of this name; there are {', '.join(programs) or 'none here'}")
    return [str(interpreter_of(program, python)), str(programs[program])]


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


def _elsewhere() -> dict[str, str]:
    """This process's environment variables without those by which a peer would see this clone or this environment."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def _run(command: Sequence[str], text: str, folder: str, program: str, timeout: float) -> str:
    """Run a command with a text on standard input, and return what it prints."""
    done = run_program(command, text, program, timeout, folder, _elsewhere())
    if done.status:
        raise ValueError(_failure(program, done.status, done.complaint))
    return done.printed


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
