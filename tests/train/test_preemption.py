"""A request to stop is a question that the loop asks, and leaves nothing behind."""

import os
import signal
import threading

import pytest

from train.run.preemption import preemption


@pytest.fixture
def interruptible():
    """Ctrl-C as in a terminal: it is ignored in the jobs that a script leaves in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_signal_becomes_a_question_and_handlers_come_back(interruptible):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    for number in (signal.SIGTERM, signal.SIGINT):
        with preemption() as stop:
            assert not stop.requested(1)
            os.kill(os.getpid(), number)
            assert stop.requested(2)
            assert stop.signal == signal.Signals(number).name
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_handlers_come_back_after_an_error_and_threads_set_none():
    before = signal.getsignal(signal.SIGTERM)

    def fail():
        with preemption():
            raise RuntimeError("in the loop")

    with pytest.raises(RuntimeError, match="in the loop"):
        fail()
    assert signal.getsignal(signal.SIGTERM) is before
    answers = []

    def elsewhere():
        with preemption() as stop:
            answers.append(stop.requested(1))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert answers == [False]
