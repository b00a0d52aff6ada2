"""For tests with vLLM: folders of exports, vLLM's answers, and whether its greedy tokens are ours."""

import json
import subprocess

import numpy as np
from asked import ROOT, logits, python_of

from jaxsteer.io.formats import FORMATS, WriteOptions
from jaxsteer.models.families import FAMILIES

CLOSE = 1e-4
"""A margin between the two largest logits below which rounding may decide which token is greedy."""


def written(model, to, folder, over=None):
    """The folder of an export, without its verdict."""
    folder.mkdir()
    options, row = WriteOptions(over=over), FORMATS[to]
    assert row.refuse(model.plan, FAMILIES[model.loaded.family], model.loaded.config, options) == []
    row.write(row.reduce(model, options), folder, options)
    return str(folder)


def run_json(python, program, request):
    """The JSON that a program of this folder answers to a request."""
    command = [python, ROOT / "tests" / "peers" / f"{program}.py"]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def ask_vllm(requests):
    """The answers of vLLM to a list of requests."""
    return run_json(python_of("vllm"), "vllm_peer", [{"generate": 0, "dtype": "float32"} | one for one in requests])


def divergences(model, prompts, answers):
    """Where greedy answers first leave ours: the margin between our two largest logits there; None = nowhere."""
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    longest = max(map(len, rows))
    ours = logits(model, [row + [0] * (longest - len(row)) for row in rows])
    margins = []
    for prompt, answer, row in zip(prompts, answers, ours, strict=True):
        row = row[len(prompt) - 1 : len(prompt) - 1 + len(answer)]
        other = np.flatnonzero(row.argmax(-1) != np.asarray(answer))
        two = np.sort(row[other[0]])[-2:] if other.size else None
        margins.append(None if two is None else float(two[1] - two[0]))
    return margins
