"""Batches made in the background: in order, never lost, and errors where they belong."""

import threading
import time
from contextlib import suppress

import pytest

from train.run.prefetch import DEPTH, Prefetch


def test_each_step_gets_its_batch():
    with Prefetch(lambda step: step * step, range(3, 40)) as batches:
        assert [batches.take(step) for step in range(3, 40)] == [step * step for step in range(3, 40)]


def test_work_goes_ahead_but_not_far():
    made = []
    with Prefetch(lambda step: made.append(step) or step, range(100)) as batches:
        batches.take(0)
        end = time.monotonic() + 5
        while len(made) < DEPTH + 2 and time.monotonic() < end:
            time.sleep(0.001)
        assert len(made) == DEPTH + 2  # one taken, those that wait, and one that waits for a place
    assert made == list(range(DEPTH + 2))


def test_an_error_is_that_of_the_step_that_needs_the_batch():
    def make(step):
        if step == 2:
            raise ValueError("no such example")
        return step

    with Prefetch(make, range(5)) as batches:
        assert [batches.take(0), batches.take(1)] == [0, 1]
        with pytest.raises(ValueError, match="no such example"):
            batches.take(2)


def test_it_stops_with_the_block():
    before = threading.active_count()
    with suppress(KeyboardInterrupt), Prefetch(lambda step: step, range(100)) as batches:
        batches.take(0)
        raise KeyboardInterrupt
    assert threading.active_count() == before


def test_the_wait_is_measured():
    ready = threading.Event()

    def make(step):
        ready.wait()
        return step

    with Prefetch(make, range(2)) as batches:
        threading.Timer(0.05, ready.set).start()
        batches.take(0)
        assert batches.waited > 0.01


def test_another_order_is_refused():
    with (
        Prefetch(lambda step: step, range(3)) as batches,
        pytest.raises(ValueError, match="next step is 0, asked for 1"),
    ):
        batches.take(1)
