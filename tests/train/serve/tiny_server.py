"""Servers and engines of a tiny model, as tests start and stop them."""

import threading
import time
from contextlib import contextmanager
from dataclasses import replace

from jaxsteer import LinearSteering, LoRA, Slot
from train.serve.listener import Listener, make_server
from train.serve.service import ServeSettings
from train.serving.engine import CLIENTS, EngineSettings

PLAN = (Slot("lora", LoRA(rank=2), ("attn.q",)), Slot("post_block", LinearSteering(rank=2), ("block",)))
SIZES = EngineSettings(replace(CLIENTS, rows=4, max_prompt=48, max_new_tokens=16, chunk=2), queue=8)
GREEDY = {"model": "steered", "temperature": 0}
ASK = [{"role": "user", "content": "ab"}]
SETTINGS = ServeSettings(timeout=60.0, max_body=20_000, loading=True)


@contextmanager
def serving(app):
    """The address of a server for an app, while the block runs."""
    listener = Listener.bind("127.0.0.1", 0)
    server = make_server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener.socket]})
    thread.start()
    assert server.ready.wait(30)
    try:
        yield listener.url
    finally:
        server.should_exit = True
        thread.join(30)


@contextmanager
def held(engine):
    """Nothing is decoded while the block runs."""
    holding, release = threading.Event(), threading.Event()

    def hold():
        holding.set()
        assert release.wait(60)

    engine._worker._messages.put(hold)
    assert holding.wait(60)
    try:
        yield
    finally:
        release.set()


def eventually(condition):
    """Wait until a condition holds that another thread brings about."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def idle(engine):
    """Whether an engine has no jobs."""
    stats = engine.stats()
    return stats.active + stats.waiting == 0


def post(client, path, **body):
    """What a route answers."""
    response = client.post(f"/v1/{path}", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def error_of(response, status):
    """The error object of a response."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error
