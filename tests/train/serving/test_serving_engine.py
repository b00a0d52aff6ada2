"""The engine as its clients see it: right answers whatever else goes on, and nothing left behind by those who leave."""

import gc
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import fast_jit
from tiny_model import TINY
from tiny_serving import SETTINGS

from jaxsteer.batches import make_batch
from jaxsteer.inference import Request
from jaxsteer.io import load_steering
from jaxsteer.models.transformer import Model, forward, logits_of, output_embedding
from train.data import TokenizedExample
from train.serving import jobs
from train.serving.engine import Busy, Draining, Engine, EngineError, NonFinite, StepFailed, Timeout
from train.serving.jobs import Ledger
from train.serving.lineup import Refused, UnknownModel
from train.serving.models import Candidate, Roster
from train.serving.worker import make_decoder

pytestmark = pytest.mark.xdist_group("serving engine")  # the tests share compiled programs
NEW, WIDTH, TIE = 12, 48, 1e-4

traced: list[str] = []
"""What JAX traces or compiles in this process."""
jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: traced.append(event))


def prompt(number, length=9):
    ids = np.random.default_rng(number).integers(3, TINY.vocab_size, length).astype(np.int32)
    return TokenizedExample(ids, np.zeros(length, bool), length, f"prompt {number}")


@dataclass
class Listening:
    """A listener that keeps what it hears."""

    heard: list = field(default_factory=list)
    first: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    on_first: Callable = lambda: None

    def __call__(self, news):
        self.heard.append(news)
        if not self.first.is_set():
            self.on_first()
        self.first.set()
        if isinstance(news, EngineError) or news.finished:
            self.ended.set()

    def wait(self):
        assert self.ended.wait(60)
        return self.heard[-1]

    def tokens(self):
        last = self.wait()
        if isinstance(last, EngineError):
            raise last
        return np.concatenate([event.tokens for event in self.heard]).tolist()


def request(engine, number, name="tiny", strength=None, new=NEW, **options):
    served = engine.roster.get(name)
    return Request(prompt(number), new, strength=served.strength(strength), adapter=served.adapter, **options)


def ask(engine, *arguments, deadline=None, **options):
    listening = Listening()
    job = engine.submit(request(engine, *arguments, **options), listening, deadline=deadline)
    return job, listening


def settle(engine):
    """Return once the engine has obeyed all that it was told before."""
    engine.run(lambda network, adapters: None).result(60)
    engine.run(lambda network, adapters: None).result(60)


def finish(engine):
    """Return once all jobs have ended and nothing is left of them."""
    while engine.stats().active + engine.stats().waiting:
        settle(engine)
    settle(engine)


@pytest.fixture(scope="module")
def alone(steering_files, tiny_loaded):
    """(name, prompt's number, strength) -> the tokens that a model with this adapter alone gives."""
    step = fast_jit(
        lambda model, base, steering, batch, strength, last: logits_of(
            forward(model, base, steering, batch, strength=strength).hidden[:, last], output_embedding(base), None
        )[0],
        static_argnames="model",
    )

    def answer(name, number, strength=1.0):
        plan, steering = (), {}
        if name != "tiny":
            file = load_steering(steering_files / f"{name}.safetensors")
            plan, steering = file.plan, file.steering
        factors = strength if isinstance(strength, dict) else dict.fromkeys([slot.name for slot in plan], strength)
        factors = {slot.name: jnp.float32(factors.get(slot.name, 1.0)) for slot in plan}
        ids, margins = prompt(number).ids.tolist(), []
        length = len(ids)
        for _ in range(NEW):
            row, segments, weights = (np.zeros((1, WIDTH), kind) for kind in (np.int32, np.int32, np.float32))
            row[0, : len(ids)], segments[0, : len(ids)], weights[0, length : len(ids)] = ids, 1, 1
            batch = make_batch(row, segments, weights)
            logits = np.asarray(
                step(Model(TINY, plan), tiny_loaded.base, steering, batch, factors, np.int32(len(ids) - 1))
            )
            second, first = np.sort(logits)[-2:]
            margins.append(first - second)
            ids.append(int(logits.argmax()))
        assert min(margins) > TIE, "choose another prompt: rounding decides here"
        return ids[length:]

    return answer


@pytest.fixture
def roster(tiny_loaded, steering_files):
    """The base with a and b, and two free places."""
    roster = Roster(tiny_loaded, "tiny", places=4, folders=[steering_files])
    roster.start_with(Candidate(name, load_steering(steering_files / f"{name}.safetensors")) for name in "ab")
    return roster


@pytest.fixture
def engine(roster):
    with Engine(roster, SETTINGS) as engine:
        engine.start()
        yield engine


@pytest.fixture
def waiting(roster):
    """An engine whose thread is not started yet, so that jobs wait."""
    with Engine(roster, SETTINGS) as engine:
        yield engine


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
        assert all(len(event.tokens) <= SETTINGS.chunk + 1 for event in listening.heard)
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
    engine = Engine(roster, replace(SETTINGS, rows=1, queue=2))
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


# ---- adapters that come and go


def test_adapters_come_and_go_while_others_decode(engine, alone, steering_files):
    """One that fits the common plan compiles nothing."""
    ask(engine, 0, "a", strength=0.5)[1].tokens()
    engine.load("warm", str(steering_files / "c.safetensors"))  # the update of the stacked tree is compiled once
    engine.unload("warm")
    ask(engine, 1, "b")[1].tokens()
    assert "/jax/core/compile/backend_compile_duration" in traced
    traced.clear()
    running = [ask(engine, number, name)[1] for number in range(4) for name in ("a", "b")]
    served = engine.load("c", str(steering_files / "c.safetensors"))
    assert (served.template, served.max_new_tokens) == ("{prompt}>", 5)
    assert engine.roster.names() == ["tiny", "a", "b", "c"]
    running.append(ask(engine, 7, "c")[1])
    engine.unload("c")
    assert engine.roster.names() == ["tiny", "a", "b"]
    heard, compiled = [listening.tokens() for listening in running], [event for event in traced if "compile" in event]
    assert compiled == []
    expected = [alone(name, number) for number in range(4) for name in ("a", "b")] + [alone("c", 7)]
    assert heard == expected


def test_an_unloaded_adapter_finishes_its_jobs(waiting, alone, steering_files):
    """Its name may be given to another one meanwhile, which does not touch them."""
    engine = waiting
    stale = engine.roster.get("a")
    _, before = ask(engine, 0, "a")
    engine.unload("a")
    with pytest.raises(UnknownModel, match="there are tiny, b"):
        engine.roster.get("a")
    with pytest.raises(UnknownModel, match="unloaded"):
        engine.submit(Request(prompt(0), NEW, adapter=stale.adapter), Listening())
    with pytest.raises(Refused, match="base model"):
        engine.unload("tiny")
    threading.Timer(0, engine.start).start()
    served = engine.load("a", str(steering_files / "c.safetensors"))
    assert served.adapter != stale.adapter
    _, after = ask(engine, 0, "a")
    assert before.tokens() == alone("a", 0)
    assert after.tokens() == alone("c", 0)


def test_places_are_taken_until_the_last_job_has_ended(tiny_loaded, steering_files, alone):
    roster = Roster(tiny_loaded, "tiny", places=4, folders=[steering_files])
    roster.start_with(Candidate(name, load_steering(steering_files / f"{name}.safetensors")) for name in "abcd")
    other = str(steering_files / "c.safetensors")
    with Engine(roster, SETTINGS) as engine:
        with pytest.raises(Refused, match="all 4 places are taken; unload one"):
            engine.load("e", other)
        _, running = ask(engine, 0, "a")
        engine.unload("a")
        with pytest.raises(Refused, match="1 of them by unloaded adapters"):
            engine.load("e", other)
        engine.start()
        assert running.tokens() == alone("a", 0)
        engine.load("e", other)
        assert ask(engine, 0, "e")[1].tokens() == alone("c", 0)
        assert roster.adapters.names == ("e", "b", "c", "d")


@pytest.mark.slow
def test_an_adapter_that_does_not_fit_makes_a_new_common_plan(tiny_loaded, steering_files, alone):
    """Jobs that run meanwhile are finished first; those that come meanwhile wait."""
    roster = Roster(tiny_loaded, "tiny", places=3, folders=[steering_files])
    with Engine(roster, SETTINGS) as engine:
        running = [ask(engine, number)[1] for number in range(3)]
        threading.Timer(0, engine.start).start()
        engine.load("a", str(steering_files / "a.safetensors"))
        assert [slot.name for slot in roster.adapters.plan] == ["lora"]
        running.append(ask(engine, 0, "a", strength=0.5)[1])
        engine.load("d", str(steering_files / "d.safetensors"))
        assert [slot.name for slot in roster.adapters.plan] == ["lora", "shift"]
        assert [listening.tokens() for listening in running] == [
            *(alone("tiny", number) for number in range(3)),
            alone("a", 0, 0.5),
        ]
        strength = {"lora": 0.5, "shift": 0.75}
        assert ask(engine, 1, "d", strength)[1].tokens() == alone("d", 1, strength)
        assert ask(engine, 1, "a")[1].tokens() == alone("a", 1)


def test_jobs_wait_while_another_decoder_takes_over(waiting, alone, steering_files):
    """Strengths are by the slots of the adapter's own plan, whatever the common plan calls them."""
    engine = waiting
    both = load_steering(steering_files / "d.safetensors")
    lineup = engine.roster.with_candidate(Candidate("d", both), engine._ledger.in_use)
    _, running = ask(engine, 0, "a")
    adopted = Future()
    engine._worker.adopt(lineup, make_decoder(engine.roster, lineup.adapters, engine.limits), adopted)
    _, held = ask(engine, 1, "b", strength=0.5)
    cancelled, silent = ask(engine, 2, "b")
    cancelled.cancel()
    _, late = ask(engine, 3, deadline=time.monotonic() - 1)
    engine.start()
    adopted.result(60)
    assert (running.tokens(), held.tokens()) == (alone("a", 0), alone("b", 1, 0.5))
    assert isinstance(late.wait(), Timeout)
    assert silent.heard == []
    assert engine.roster.names() == ["tiny", "a", "b", "d"]
