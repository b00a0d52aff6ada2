"""For tests with other programs: what they answer about an export, and what jaxsteer itself computes."""

import json
import subprocess
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_steering, run

from jaxsteer.batches import make_batch
from jaxsteer.io import load_model
from jaxsteer.io.formats import Given, WriteOptions
from jaxsteer.io.steered import SteeredModel
from jaxsteer.models.families import FAMILIES
from jaxsteer.models.transformer import logits_of, output_embedding
from jaxsteer.plans import parse_plan

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


def check_export(format, environment, base, texts, folder):
    """Export random steering, and hold what a peer and what jaxsteer read from it against our own forward.

    Args:
        format: the module of the format.
        environment: of the peer.
        base: folder of the base model.
        texts: the plan.
        folder: an empty folder.
    """
    loaded, export, merged = load_model(base), folder / "export", folder / "merged.npy"
    plan, options = parse_plan(texts, loaded.config), WriteOptions()
    steered = SteeredModel(loaded, plan, random_steering(plan, loaded.config, scale=0.2))
    assert format.refuse(plan, FAMILIES[loaded.family], loaded.config, options) == []
    export.mkdir()
    format.write(format.reduce(steered, options), export, options)
    # No longer than the windows of the tiny models, which MLX-LM does not have.
    tokens = np.random.default_rng(0).integers(3, loaded.config.vocab_size, (2, 3)).tolist()
    request = {"path": str(export), "base": str(base), "tokens": tokens, "generate": 4, "merged_out": str(merged)}
    answer, theirs = ask(environment, f"{format.FORMAT.name}_peer", request, folder)
    ours, plain = logits(steered, tokens), logits(SteeredModel(loaded), tokens)
    errors = {"peer": theirs, "read back": logits(format.read(export, loaded, Given()), tokens)}
    errors |= {"merged": np.load(merged)} if merged.exists() else {}
    largest = {name: float(abs(values - ours).max()) for name, values in errors.items()}
    print(base.name, texts, {name: f"{error:.1e}" for name, error in largest.items()}, answer["versions"])
    assert abs(plain - ours).max() > 0.02
    assert max(largest.values()) <= 1e-5
    assert answer["generated"] == greedy(steered, tokens, 4)
