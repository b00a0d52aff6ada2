"""A server under load by 64 clients: each finished answer is the unbatched one, and nothing is left over.

The requests differ in adapter, strength, length, streaming and shared beginnings; some clients leave, some read slowly,
some send what is no request.
"""

import asyncio
import json
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from load_clients import all_of, visits
from server_process import ROOT, server_process
from tiny import random_steering
from tiny_model import TINY
from tiny_tokenizer import tiny_tokenizer
from unbatched import CLOSE, Question, Unbatched

from jaxsteer.io import load_model, load_steering, save_hf, save_steering
from jaxsteer.models.transformer import init_base
from jaxsteer.plans import parse_plan

LONGEST = 24
LEAK = 24
"""MB that 1,000 requests may add to the server's memory, which grows in steps of some MB without a leak: 24 kB each is
less than what the server has of a request while it answers."""
SHARED = "Once upon a time there was a model that was steered, and it said: "
LONG = "the quick brown fox jumps over the lazy dog. " * 9  # more tokens than are read at once
TEXTS = ("ab", "x", "Hello, world", "<b>bold</b>", "1 2 3", *(f"{SHARED}{word}" for word in ("yes", "no", "why")))
PLANS = {
    "all": ("lora(rank=2) @ attn.q", "linear(rank=2) @ block"),
    "last": ("nonlinear(rank=2) @ block positions=last",),
    "completion": ("linear(rank=2) @ block positions=completion",),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder of a model whose tokens are ASCII characters, so that texts tell tokens, and of its steering files."""
    folder, tokenizer = tmp_path_factory.mktemp("load"), tiny_tokenizer()
    base = init_base(TINY, jax.random.key(3))
    texts = [tokenizer.decode([i]) for i in range(TINY.vocab_size)]
    scale = np.array([20.0 * (text.isascii() and text.isprintable()) for text in texts], np.float32)[:, None]
    base |= {"embed": {"embedding": base["embed"]["embedding"] * scale}}
    save_hf(folder / "tiny", TINY, base, "llama", tokenizer)
    for seed, (name, texts) in enumerate(PLANS.items()):
        plan = parse_plan(texts, TINY)
        steering = random_steering(plan, TINY, seed, scale=0.5)
        save_steering(folder / f"{name}.safetensors", steering, plan, model_name=str(folder / "tiny"), config=TINY)
    return folder


def questions():
    asked = []
    for text in (*TEXTS, LONG, LONG[:300], LONG[:300] + "?"):
        asked.append(Question("tiny", text))
        asked += [Question(name, text) for name in PLANS]
        asked.append(Question("all", text, strength=0.5))
        asked.append(Question("all", text, strength=("linear", 1.5)))
        asked.append(Question("last", text, strength=-1.0))
    return asked + [Question(name, text, chat=True) for name in ("tiny", *PLANS) for text in TEXTS]


def differences(outcomes, unbatched):
    """Answers that differ from the unbatched ones, with the margin where they begin to."""
    found = []
    for outcome in outcomes:
        visit = outcome.visit
        if not outcome.answers or visit.kind == "sampled":
            continue
        want = expected(visit, unbatched)
        assert len(outcome.answers) == visit.more.get("n", 1)
        found += [(visit, answer, want) for answer in outcome.answers if answer != want]
    return [(unbatched.margin_of(visit.question, answer[0]), visit, answer, want) for visit, answer, want in found]


def expected(visit, unbatched):
    text, end = unbatched.text(visit.question, visit.count)
    cuts = [at for stop in visit.more.get("stop", ()) if (at := text.find(stop)) >= 0]
    return (text[: min(cuts)], "stop") if cuts else (text, end)


def sampled(outcomes):
    """Texts of answers that were drawn, by all that decides them."""
    found = {}
    for outcome in outcomes:
        if outcome.visit.kind == "sampled":
            key = (outcome.visit.question, tuple(sorted(outcome.visit.more.items())))
            found.setdefault(key, []).append(outcome.answers)
    return found


def send(server, wanted):
    """Make visits, and wait until the server has nothing left to do."""
    outcomes = asyncio.run(all_of(server.url, wanted))
    end = time.monotonic() + 60
    while not server.idle():
        assert time.monotonic() < end, server.metrics()
        time.sleep(0.05)
    return outcomes


def check(server, outcomes, unbatched):
    """No wrong answer, no error of the server, and nothing left over."""
    answered = [outcome for outcome in outcomes if outcome.answers]
    different = differences(outcomes, unbatched)
    assert not [each for each in different if each[0] >= CLOSE]
    assert len(different) <= 0.01 * len(answered)
    assert not {status for status in server.statuses() if status >= 500}
    figures = server.metrics()
    assert (figures["jaxsteer_running"], figures["jaxsteer_waiting"]) == (0, 0)
    assert (figures["jaxsteer_failed_total"], figures["jaxsteer_engine_restarts_total"]) == (0, 0)
    assert "Traceback" not in "".join(server.printed)


def answers_differ(unbatched, names, text):
    """Whether steering is seen: all models answer something else."""
    return len({unbatched.text(Question(name, text), unbatched.longest) for name in names}) == len(names)


@pytest.mark.slow
def test_2000_requests(models):
    sources = [models / f"{name}.safetensors" for name in PLANS]
    sizes = ("--rows", 16, "--queue", 100, "--max-prompt", 512, "--max-new-tokens", LONGEST, "--max-body", 65536)
    files = {name: load_steering(path) for name, path in zip(PLANS, sources, strict=True)}
    unbatched = Unbatched(load_model(models / "tiny"), "tiny", files, LONGEST)
    wanted = visits(questions(), 1000, LONGEST, seed=0)
    with server_process(*sources, *sizes) as server:
        outcomes = send(server, wanted)
        before = server.memory()
        outcomes += send(server, wanted)
        grown = server.memory() - before
        check(server, outcomes, unbatched)
        assert server.metrics()["jaxsteer_prefix_hits_total"] > 0
        assert server.metrics()["jaxsteer_cancelled_total"] > 0
        assert {400, 404, 413, 415, 499} <= set(server.statuses())
    assert answers_differ(unbatched, ("tiny", *PLANS), "Hello, world")
    drawn = sampled(outcomes)
    assert sum(len(set(answers)) > 1 for answers in drawn.values()) <= 0.01 * sum(map(len, drawn.values()))
    assert grown < LEAK


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Steering files for SmolLM2: one trained for a few steps, and the opposite of it."""
    folder = tmp_path_factory.mktemp("trained")
    rows = [{"prompt": f"What is {i} + {i}? ", "completion": f"It is {2 * i}, of course!"} for i in range(64)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "train", "sft", "jsonl", "--task.train", str(folder / "data.jsonl")]
    command += ["--model", "smollm2-135m-instruct", "--plan", "nonlinear(rank=4) @ block", "--out", str(folder / "run")]
    command += ["--steps", "4", "--batch-size", "4", "--sequence-length", "64", "--optim.lr", "1e-2"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    file = load_steering(folder / "run" / "steering.safetensors")
    opposite = jax.tree.map(lambda x: -x, file.steering)
    save_steering(folder / "opposite.safetensors", opposite, file.plan, model_name=file.model_name, config=file.config)
    return {"trained": folder / "run" / "steering.safetensors", "opposite": folder / "opposite.safetensors"}


@pytest.mark.slow
def test_200_requests_to_smollm2(smollm2, trained):
    base, longest = "smollm2-135m-instruct", 8
    texts = ("What is 3 + 4? ", "The capital of France", "Once upon a time", f"{LONG * 3} And then")
    names = (base, *trained)
    asked = [Question(name, text) for name in names for text in texts]
    asked += [Question(name, "Name a colour.", chat=True) for name in names]
    asked += [Question("trained", text, strength=0.5) for text in texts[:2]]
    unbatched = Unbatched(smollm2, base, {name: load_steering(path) for name, path in trained.items()}, longest)
    sources = [f"{name}={path}" for name, path in trained.items()]
    sizes = ("--rows", 16, "--max-prompt", 512, "--max-new-tokens", 16, "--max-body", 65536)
    with server_process(*sources, *sizes) as server:
        check(server, send(server, visits(asked, 200, longest, seed=1)), unbatched)
    assert answers_differ(unbatched, names, texts[0])
