"""Events in asyncio: whoever stops reading gives the row back."""

import asyncio
import gc
import threading
from dataclasses import replace

import numpy as np
import pytest
from tiny_model import TINY
from tiny_serving import SETTINGS

from jaxsteer.inference import Request
from train.data import TokenizedExample
from train.serving.engine import Busy, Engine, Timeout
from train.serving.models import Roster
from train.serving.streams import events

pytestmark = pytest.mark.xdist_group("serving engine")


def request(number=0, new=12):
    ids = np.random.default_rng(number).integers(3, TINY.vocab_size, 9).astype(np.int32)
    return Request(TokenizedExample(ids, np.zeros(9, bool), 9, "prompt"), new)


@pytest.fixture
def engine(tiny_loaded):
    with Engine(Roster(tiny_loaded, "tiny"), SETTINGS) as engine:
        engine.start()
        yield engine


async def read(engine, number=0):
    return np.concatenate([event.tokens async for event in events(engine, request(number))]).tolist()


def finished(engine):
    """The engine's figures once all jobs have ended."""
    while (stats := engine.stats()).active + stats.waiting:
        engine.run(lambda network, adapters: None).result(60)
    assert engine._worker.decoder.pending == 0
    return stats


def test_many_readers(engine):
    async def all_of_them():
        return await asyncio.gather(*(read(engine, number % 3) for number in range(9)))

    answers = asyncio.run(all_of_them())
    assert answers[:3] == answers[3:6] == answers[6:]
    assert [len(answer) for answer in answers] == [12] * 9
    assert finished(engine).finished == 9


async def leaves_a_block(engine):
    async with events(engine, request()) as stream:
        async for _ in stream:
            break
    assert [event async for event in stream] == []


async def closes(engine):
    stream = events(engine, request())
    await anext(stream)
    await stream.aclose()


async def forgets(engine):
    async for _ in events(engine, request()):
        break
    gc.collect()


async def never_reads(engine):
    events(engine, request())
    gc.collect()


async def is_cancelled(engine):
    task = asyncio.create_task(read(engine))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("leave", [leaves_a_block, closes, forgets, never_reads, is_cancelled])
def test_who_leaves_frees_the_row(engine, leave, monkeypatch):
    """An answer has several chunks, the second of which waits for the reader to leave."""
    left, told, step = threading.Event(), [], engine._worker.decoder.step

    def once_and_then_wait():
        assert not told or left.wait(60)
        events = step()
        told.extend(events)
        return events

    monkeypatch.setattr(engine._worker.decoder, "step", once_and_then_wait)
    asyncio.run(leave(engine))
    left.set()
    stats = finished(engine)
    assert (stats.submitted, stats.cancelled, stats.finished) == (1, 1, 0)


def test_errors_reach_the_reader(engine):
    async def late():
        stream = events(engine, request(), deadline=0.0)
        with pytest.raises(Timeout):
            await anext(stream)
        assert [event async for event in stream] == []

    asyncio.run(late())


def test_a_full_queue_is_known_before_anything_is_read(tiny_loaded):
    async def too_many(engine):
        first = events(engine, request())
        with pytest.raises(Busy):
            events(engine, request())
        await first.aclose()

    engine = Engine(Roster(tiny_loaded, "tiny"), replace(SETTINGS, limits=replace(SETTINGS.limits, rows=1), queue=0))
    with engine:
        asyncio.run(too_many(engine))


def test_a_reader_whose_loop_is_gone_disturbs_nobody(engine):
    kept = []

    async def submit():
        kept.append(events(engine, request()))

    asyncio.run(submit())
    assert finished(engine).finished == 1
