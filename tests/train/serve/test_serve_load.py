"""A server under load: 64 clients at a time, each of whose finished answers is the unbatched one, and nothing is left over.

The requests differ in adapter, strength, length, streaming and shared beginnings; some clients leave, some read slowly,
some send what is no request.
"""

import asyncio
import time

import jax
import numpy as np
import pytest
from load_clients import all_of, visits
from server_process import server_process
from tiny import random_steering
from tiny_model import TINY
from tiny_tokenizer import tiny_tokenizer
from unbatched import CLOSE, Question, Unbatched

from jaxsteer.io import load_model, load_steering, save_hf, save_steering
from jaxsteer.models.transformer import init_base
from jaxsteer.plans import parse_plan

LONGEST = 24
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


@pytest.mark.slow
def test_2000_requests(models):
    sources = [models / f"{name}.safetensors" for name in PLANS]
    sizes = ("--rows", 16, "--queue", 56, "--max-prompt", 512, "--max-new-tokens", LONGEST, "--max-body", 65536)
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
    texts = {name: unbatched.text(Question(name, "Hello, world"), LONGEST) for name in ("tiny", *PLANS)}
    assert len(set(texts.values())) == len(texts)
    drawn = sampled(outcomes)
    assert sum(len(set(answers)) > 1 for answers in drawn.values()) <= 0.01 * sum(map(len, drawn.values()))
    assert grown < 8, grown
