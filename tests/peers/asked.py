"""For tests with other programs: what they answer about an export, and what jaxsteer itself computes."""

import json
import subprocess
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import run

from jaxsteer.batches import make_batch
from jaxsteer.models.transformer import logits_of, output_embedding

ROOT = Path(__file__).resolve().parents[2]


def python_of(environment):
    """The Python of an environment that `make peers` makes; the test is skipped if it is not there."""
    python = ROOT / ".peers" / environment / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no environment {python.parents[1]}: run `make peers`")
    return python


def ask(environment, program, request, folder):
    """Run a program of this folder in an environment.

    Args:
        environment: its name.
        program: "peft_peer", ...
        request: what it is asked; dtype and generate have defaults.
        folder: for its files.

    Returns:
        Its answer, and the array in its .npy file.
    """
    out = folder / "answer.npy"
    request = {"generate": 0, "dtype": "float32", "out": str(out)} | request
    command = [python_of(environment), ROOT / "tests" / "peers" / f"{program}.py"]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1]), np.load(out)


def logits(steered, tokens):
    """Our own logits."""
    batch = make_batch(np.asarray(tokens, np.int32), None, np.zeros(np.shape(tokens), np.float32))
    hidden = run(steered.model, steered.base, steered.steering, batch).hidden
    return np.asarray(logits_of(hidden, output_embedding(steered.base), steered.loaded.config.final_softcap))


def tokens_for(config, rows=2, length=12):
    """Random token ids as lists."""
    return np.random.default_rng(0).integers(3, config.vocab_size, (rows, length)).tolist()


def greedy(steered, tokens, count):
    """Our own greedy continuations, without a cache."""
    rows = [list(row) for row in tokens]
    for _ in range(count):
        best = jnp.argmax(logits(steered, rows)[:, -1], -1)
        rows = [[*row, int(token)] for row, token in zip(rows, best, strict=True)]
    return [row[len(tokens[0]) :] for row in rows]
