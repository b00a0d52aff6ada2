"""Adapters that come and go while others decode."""

import threading
import time
from concurrent.futures import Future

import jax
import pytest
from engine_clients import NEW, Listening, ask, prompt
from tiny_serving import SETTINGS

from jaxsteer.inference import Request
from jaxsteer.io import load_steering
from train.serving.engine import Engine, Timeout
from train.serving.lineup import Refused, UnknownModel
from train.serving.models import Candidate, Roster
from train.serving.worker import make_decoder

pytestmark = pytest.mark.xdist_group("serving engine")  # the tests share compiled programs

traced: list[str] = []
"""What JAX traces or compiles in this process."""
jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: traced.append(event))


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
