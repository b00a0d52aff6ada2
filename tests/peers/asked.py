"""For tests with other programs: what they answer about an export, and what jaxsteer itself computes."""

from pathlib import Path

import numpy as np
import pytest
from exported import family_model, folder_of, logits, read_again, steered_of, written

from jaxsteer.io.formats import FORMATS
from jaxsteer.io.steered import SteeredModel
from train import peers

ROOT = Path(__file__).resolve().parents[2]


def python_of(program):
    """The Python of the environment of a peer, which `make peers` makes; the test is skipped if it is not there."""
    try:
        return peers.interpreter_of(program, None)
    except ValueError as error:
        pytest.skip(str(error))


def ask(program, request):
    """The answer of a peer to a request, in which dtype and generate have defaults."""
    return peers.run_peer(program, {"generate": 0, "dtype": "float32"} | request, python_of(program))


def tokens_for(config, rows=2, length=12):
    """Random token ids as lists."""
    return np.random.default_rng(0).integers(3, config.vocab_size, (rows, length)).tolist()


def greedy(steered, tokens, count):
    """Our own greedy continuations, without a cache."""
    rows = np.asarray(tokens)
    for _ in range(count):
        rows = np.concatenate([rows, logits(steered, rows)[:, -1:].argmax(-1)], 1)
    return rows[:, len(tokens[0]) :].tolist()


def check_export(name, golden, base, texts, folder):
    """Export random steering, and hold what a peer and what jaxsteer read from it against our own forward.

    Args:
        name: of the format.
        golden: the folder of the tiny models.
        base: the family of the base model, or its folder's name.
        texts: the plan.
        folder: an empty folder.
    """
    format, export, merged = FORMATS[name], folder / "export", folder / "merged.npy"
    steered = steered_of(family_model(golden, base), *texts, scale=0.2)
    written(format, steered, export)
    # No longer than the windows of the tiny models, which MLX-LM does not have.
    tokens = tokens_for(steered.loaded.config, length=3)
    request = {"path": str(export), "base": str(folder_of(golden, base)), "tokens": tokens, "generate": 4}
    answer = ask(format.verify, request | {"merged_out": str(merged)})
    ours, plain = logits(steered, tokens), logits(SteeredModel(steered.loaded), tokens)
    errors = {"peer": answer.values, "read back": logits(read_again(format, export, steered), tokens)}
    errors |= {"merged": np.load(merged)} if merged.exists() else {}
    largest = {name: float(abs(values - ours).max()) for name, values in errors.items()}
    print(base, texts, {name: f"{error:.1e}" for name, error in largest.items()}, answer.versions)
    assert abs(plain - ours).max() > 0.02
    assert max(largest.values()) <= 1e-5
    assert answer.generated.tolist() == greedy(steered, tokens, 4)
