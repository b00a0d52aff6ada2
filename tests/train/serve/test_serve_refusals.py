"""What the routes refuse, and how they say it."""

from dataclasses import replace

import pytest
from starlette.testclient import TestClient
from tiny_server import ASK, GREEDY, SETTINGS, SIZES, error_of, eventually, held, idle

from jaxsteer.inference import Request
from train.serve.app import make_app
from train.serve.security import LOCAL_NAMES
from train.serving.engine import Busy, Draining, Engine, Job, NonFinite, StepFailed, Timeout
from train.serving.prompts import plain_prompt


def test_errors_of_requests(client):
    ask = lambda path="completions", **body: client.post(f"/v1/{path}", json=GREEDY | {"prompt": "ab"} | body)
    error = error_of(ask(model="steerde"), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert "did you mean steered?" in error["message"]
    assert "up to 48 (--max-prompt)" in error_of(ask(prompt="a" * 60), 400)["message"]
    assert error_of(ask(prompt="a" * 60), 400)["code"] == "context_length_exceeded"
    assert "at most 16" in error_of(ask(max_tokens=17), 400)["message"]
    assert "at most 12" in error_of(ask(n=13), 400)["message"]
    assert "0 to 258" in error_of(ask(prompt=[259]), 400)["message"]
    assert "empty" in error_of(ask(prompt=""), 400)["message"]
    last = [*ASK, {"role": "assistant", "content": "x"}]
    error = error_of(client.post("/v1/chat/completions", json=GREEDY | {"messages": last}), 400)
    assert error["param"] == "messages"
    error = error_of(
        client.post("/v1/completions", json=GREEDY | {"model": "tiny", "prompt": "a", "steering_strength": 1}), 400
    )
    assert error["param"] == "steering_strength"


def test_bodies_that_are_none(client):
    send = lambda content, kind="application/json": client.post(
        "/v1/completions", content=content, headers={"content-type": kind}
    )
    assert "not valid JSON" in error_of(send(b"{"), 400)["message"]
    assert "not valid JSON" in error_of(send(b'{"model": "\xff"}'), 400)["message"]
    assert "must be application/json" in error_of(send(b"{}", "text/plain"), 415)["message"]
    assert "--max-body" in error_of(send(b" " * 20_001), 413)["message"]
    assert "--max-body" in error_of(send(iter([b" " * 15_000, b" " * 15_000])), 413)["message"]  # of no declared length


def test_routes_that_are_none(client):
    assert error_of(client.get("/v1/nothing"), 404)["type"] == "invalid_request_error"
    response = client.get("/v1/completions")
    error_of(response, 405)
    assert response.headers["allow"] == "POST"


def test_a_full_queue_is_told_when_to_try_again(client, engine):
    with held(engine):
        jobs = [
            engine.submit(Request(plain_prompt(engine.roster.loaded, "a", "a").tokens, 1), lambda news: None)
            for _ in range(12)
        ]
        response = client.post("/v1/completions", json=GREEDY | {"prompt": "ab"})
        error = error_of(response, 429)
        for job in jobs:
            job.cancel()
    assert error["type"] == "rate_limit_error"
    assert int(response.headers["retry-after"]) >= 1
    eventually(lambda: idle(engine))


def test_a_deadline_that_has_passed(engine):
    hasty = TestClient(make_app(engine, replace(SETTINGS, timeout=0.05)))
    with held(engine):
        streamed = hasty.post("/v1/completions", json=GREEDY | {"prompt": "ab", "stream": True})
        error_of(hasty.post("/v1/effects", json={"model": "steered", "prompt": "ab"}), 504)
    assert '"code":"timeout"' in streamed.text
    assert "[DONE]" not in streamed.text


def test_a_server_that_is_being_stopped(engine):
    closed = Engine(engine.roster, SIZES)
    closed.close()
    stopping = TestClient(make_app(closed, SETTINGS))
    response = stopping.get("/health")
    assert (response.status_code, response.json()) == (503, {"status": "draining"})
    for path in ("completions", "effects"):
        response = stopping.post(f"/v1/{path}", json={"model": "steered", "prompt": "ab"})
        assert error_of(response, 503)["code"] == "draining"
        assert response.headers["retry-after"]


@pytest.mark.parametrize(
    ("error", "status"),
    [(Busy("full", 7), 429), (Draining(), 503), (Timeout(), 504), (NonFinite(), 400), (StepFailed(), 500)],
)
def test_errors_of_the_engine(client, engine, monkeypatch, error, status):
    def submit(job, listener, *, deadline):
        if isinstance(error, (Busy, Draining)):
            raise error
        listener(error)
        return Job(0, job, listener, deadline, lambda job: None)

    monkeypatch.setattr(engine, "submit", submit)
    response = client.post("/v1/completions", json=GREEDY | {"prompt": "ab"})
    error_of(response, status)
    assert response.headers.get("retry-after") == {429: "7", 503: "5"}.get(status)


def test_a_bug_is_not_shown_to_clients(client, engine, monkeypatch):
    monkeypatch.setattr(type(engine.roster), "names", lambda roster: 1 / 0)
    error = error_of(client.get("/v1/models"), 500)
    assert (error["type"], error["code"]) == ("server_error", "internal_error")
    assert "division" not in error["message"]


def test_the_key(engine):
    guarded = TestClient(make_app(engine, replace(SETTINGS, api_key="secret")))
    assert guarded.get("/health").status_code == 200
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Basic secret"},
        {"authorization": "secret"},
    ):
        error = error_of(guarded.get("/v1/models", headers=headers), 401)
        assert error["code"] == "invalid_api_key"
    assert guarded.get("/metrics").status_code == 401
    assert guarded.get("/openapi.json").status_code == 401  # it names the models
    assert guarded.get("/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200


def test_only_local_names_are_answered_without_a_key(engine):
    local = TestClient(make_app(engine, replace(SETTINGS, allowed_hosts=LOCAL_NAMES)))
    answered = lambda host: local.get("/health", headers={"host": host}).status_code
    assert [answered(host) for host in ("localhost:80", "127.0.0.1", "[::1]:8000", "LOCALHOST")] == [200] * 4
    assert [answered(host) for host in ("evil.example", "localhost.evil.example:80", "")] == [421] * 3
