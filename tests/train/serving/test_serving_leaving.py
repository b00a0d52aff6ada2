"""Clients who leave, wait or find no room, and nothing left behind by those who have gone."""

import gc
import time
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
from engine_clients import Listening, ask, finish, prompt, request, settle
from tiny_serving import SETTINGS

from jaxsteer.inference import Request
from train.serving import jobs
from train.serving.engine import Busy, Draining, Engine, Timeout
from train.serving.jobs import Ledger

pytestmark = pytest.mark.xdist_group("serving engine")  # the tests share compiled programs


# ---- leaving


def test_a_cancelled_job_frees_its_row_and_is_told_nothing_more(waiting, alone):
    engine = waiting
    listening = Listening()
    job = engine.submit(request(engine, 0, "a"), listening)
    listening.on_first = job.cancel
    early, never = ask(engine, 1)
    early.cancel()
    _, other = ask(engine, 2, "b")
    engine.start()
    assert other.tokens() == alone("b", 2)
    settle(engine)
    assert len(listening.heard) == 1
    assert listening.heard[0].finished is None
    assert never.heard == []
    stats = engine.stats()
    assert (stats.cancelled, stats.finished, stats.active, stats.waiting) == (2, 1, 0, 0)
    assert engine._worker.decoder.pending == 0
    job.cancel()  # has no effect
    settle(engine)
    assert engine.stats().cancelled == 2


def test_a_deadline_counts_for_those_who_wait_and_for_those_who_are_answered(waiting, alone):
    engine = waiting
    _, late = ask(engine, 0, deadline=time.monotonic() - 1)
    running = Listening()
    job = engine.submit(request(engine, 1), running, deadline=time.monotonic() + 1000)

    def pass_by():
        job.deadline = 0.0

    running.on_first = pass_by
    _, patient = ask(engine, 2, deadline=time.monotonic() + 1000)
    engine.start()
    for listening in (late, running):
        assert isinstance(listening.wait(), Timeout)
    assert (len(late.heard), len(running.heard)) == (1, 2)
    assert patient.tokens() == alone("tiny", 2)
    assert engine._worker.decoder.pending == 0
    assert engine.stats().failed == 2


def test_a_full_queue_says_when_to_come_back(roster):
    engine = Engine(roster, replace(SETTINGS, limits=replace(SETTINGS.limits, rows=1), queue=2))
    heard = [ask(engine, number)[1] for number in range(3)]
    with pytest.raises(Busy) as refused:
        ask(engine, 3)
    assert 1 <= refused.value.retry_after <= 60
    for _ in range(2):
        engine.run(lambda network, adapters: None)
    with pytest.raises(Busy):
        engine.run(lambda network, adapters: None)
    assert engine.stats().waiting == 3
    engine.close()
    assert [type(listening.wait()) for listening in heard] == [Draining] * 3


def test_the_time_to_come_back_follows_the_rate_of_late(monkeypatch):
    """Half the queue of 20, at two jobs a second; what ended long ago does not count."""
    now = [1000.0]
    monkeypatch.setattr(jobs, "time", SimpleNamespace(monotonic=lambda: now[0]))
    ledger, each = Ledger(rows=10, queue=20), Request(prompt(0), 1)

    def fill():
        while True:
            ledger.accept(each)

    def refused():
        with pytest.raises(Busy) as busy:
            fill()
        return busy.value.retry_after

    assert refused() == 1  # nothing is known
    for _ in range(8):
        ledger.ended(each, "finished")
        now[0] += 0.5
    assert refused() == 5
    now[0] += 100
    ledger.ended(each, "failed")
    now[0] += 30
    assert refused() == 60


# ---- memory


def ended_requests(engine, count):
    """Answer this many short requests of all models, a few of them cancelled; weak references to what they had."""
    left = []
    for number in range(count):
        asked = request(engine, number % 50, ("tiny", "a", "b")[number % 3], new=1 + number % 2)
        listener = lambda news: None
        try:
            job = engine.submit(asked, listener)
        except Busy:
            finish(engine)
            job = engine.submit(asked, listener)
        left += [weakref.ref(asked), weakref.ref(listener), weakref.ref(job)]
        if number % 10 == 9:
            job.cancel()
    finish(engine)
    return left


def test_nothing_of_a_job_is_kept(engine):
    left = ended_requests(engine, 200)
    gc.collect()
    assert sum(each() is not None for each in left) == 0
    kept, listening = ask(engine, 0)
    listening.wait()
    finish(engine)
    assert kept.request is None  # although its client keeps the job


@pytest.mark.slow
def test_memory_is_flat_over_10_000_requests(engine):
    ended_requests(engine, 2000)
    gc.collect()
    before = len(gc.get_objects())
    left = ended_requests(engine, 10_000)
    assert not any(each() for each in left)
    del left
    gc.collect()
    assert len(gc.get_objects()) - before < 500
    assert engine._ledger.open_jobs == 0
