"""The engine as its clients see it: right answers whatever else goes on, closing, and failures."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from engine_clients import NEW, Listening, ask, prompt, request, settle
from tiny_serving import SETTINGS

from jaxsteer.inference import Request
from train.serving.engine import Draining, Engine, NonFinite, StepFailed
from train.serving.lineup import Refused
from train.serving.models import Roster

pytestmark = pytest.mark.xdist_group("serving engine")  # the tests share compiled programs


# ---- answers


def test_each_client_gets_what_it_would_get_alone(engine, alone):
    asked = [(name, number, 1.0) for number in range(3) for name in ("tiny", "a", "b")]
    asked += [("a", 3, 0.5), ("b", 4, 1.5), ("a", 5, {"lora": 0.0}), ("b", 6, {"shift": 0.25})]
    with ThreadPoolExecutor(len(asked)) as pool:
        strengths = [None if name == "tiny" else strength for name, _, strength in asked]
        submit = lambda each, strength: ask(engine, each[1], each[0], strength)[1]
        heard = list(pool.map(submit, asked, strengths))
    for (name, number, strength), listening in zip(asked, heard, strict=True):
        assert listening.tokens() == alone(name, number, strength)
        assert listening.heard[-1].finished == "length"
        assert all(len(event.tokens) <= SETTINGS.limits.chunk + 1 for event in listening.heard)
    assert len({tuple(alone(name, 0)) for name in ("tiny", "a", "b")}) == 3
    stats = engine.stats()
    assert (stats.submitted, stats.finished, stats.active, stats.waiting) == (13, 13, 0, 0)
    assert (stats.new_tokens, stats.prompt_tokens) == (13 * NEW, 13 * 9)


def test_a_request_for_the_likeliest_tokens(engine):
    _, listening = ask(engine, 1, "a", top=3)
    tokens = listening.tokens()
    assert np.concatenate([event.top.tokens[:, 0] for event in listening.heard]).tolist() == tokens


def test_the_base_model_alone(tiny_loaded, alone):
    with Engine(Roster(tiny_loaded, "tiny"), SETTINGS) as engine:
        engine.start()
        assert ask(engine, 0)[1].tokens() == alone("tiny", 0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"new": 13}, "13 new tokens"),
        ({"adapter": "nobody"}, "nobody"),
        ({"strength": {"nowhere": 2.0}, "adapter": "a"}, "nowhere"),
        ({"length": 33}, "33 tokens in the prompt"),
    ],
)
def test_requests_that_cannot_be_answered_are_refused_at_once(waiting, change, said):
    new, length = change.pop("new", NEW), change.pop("length", 9)
    with pytest.raises(ValueError, match=said):
        waiting.submit(Request(prompt(0, length), new, **change), Listening())
    assert waiting.stats().submitted == 0


def test_logits_that_are_not_finite(engine, alone):
    with pytest.raises(NonFinite, match="strength is too large"):
        ask(engine, 0, "b", strength=3e38)[1].tokens()
    assert engine.stats().failed == 1
    assert ask(engine, 0, "b")[1].tokens() == alone("b", 0)


# ---- closing


def test_closing_finishes_what_runs_and_takes_no_more(engine, alone):
    started = [ask(engine, number, "a")[1] for number in range(6)]
    called = engine.run(lambda network, adapters: "done")
    engine.close(grace=60)
    assert [listening.tokens() for listening in started] == [alone("a", number) for number in range(6)]
    assert called.result(0) == "done"
    assert engine.draining
    for refused in (lambda: ask(engine, 9), lambda: engine.run(lambda *_: 0), lambda: engine.load("c", "c")):
        with pytest.raises((Draining, Refused)):
            refused()


def test_closing_without_grace_ends_what_runs(waiting, monkeypatch):
    engine, closing, closed, calls = waiting, threading.Event(), threading.Event(), []
    finish = engine._worker.finish
    monkeypatch.setattr(engine._worker, "finish", lambda end: (finish(end), closing.set()))
    thread = threading.Thread(target=engine.close)

    def close():
        calls.extend(engine.run(lambda network, adapters: closed.wait(60)) for _ in range(2))
        thread.start()
        closing.wait(60)

    running = Listening(on_first=close)
    engine.submit(request(engine, 0), running)
    others = [ask(engine, number)[1] for number in range(1, 9)]
    engine.start()
    for listening in (running, *others):
        assert isinstance(listening.wait(), Draining)
    thread.join(60)
    with pytest.raises(Draining):
        calls[1].result(0)
    closed.set()
    assert calls[0].result(60)  # it had begun
    stats = engine.stats()
    assert (stats.active, stats.waiting, stats.failed) == (0, 0, 9)


# ---- failures


def test_a_failing_step_ends_its_jobs_and_no_others(engine, alone, monkeypatch):
    broken = engine._worker.decoder

    def fail():
        raise RuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(broken, "step", fail)
    with pytest.raises(StepFailed, match="RuntimeError"):
        ask(engine, 0, "a")[1].tokens()
    assert ask(engine, 0, "a")[1].tokens() == alone("a", 0)
    assert engine.stats().restarts == 1
    assert engine._worker.decoder is not broken


def test_a_listener_that_fails_loses_its_own_job_only(engine, alone):
    def fail(news):
        raise RuntimeError("here")

    engine.submit(request(engine, 0), fail)
    assert ask(engine, 1)[1].tokens() == alone("tiny", 1)
    settle(engine)
    assert engine.stats().restarts == 0
    assert engine._worker.decoder.pending == 0


def test_work_beside_the_engine_sees_its_adapters(engine):
    places, plan = engine.run(lambda network, adapters: (adapters.names, network.model.plan)).result(60)
    assert places == ("a", "b", None, None)
    assert plan == engine.roster.adapters.plan
    failing = engine.run(lambda network, adapters: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        failing.result(60)


def test_answers_come_while_work_is_done_beside(engine, alone):
    release = threading.Event()
    held = engine.run(lambda network, adapters: release.wait(60))
    assert ask(engine, 0, "a")[1].tokens() == alone("a", 0)
    assert not held.done()
    release.set()
    assert held.result(60)


def test_an_idle_engine_waits(engine):
    """A round for each message, and none in between."""
    rounds = []
    step = engine._worker.decoder.step
    engine._worker.decoder.step = lambda: rounds.append(1) or step()
    ask(engine, 0)[1].wait()
    settle(engine)
    before = len(rounds)
    for _ in range(20):
        engine.run(lambda network, adapters: None).result(60)
    assert len(rounds) - before <= 2 * 20 + 4  # a call is a message when it comes and one when it ends
