"""`jaxsteer serve` as it is typed: what it refuses, how it starts, and how it ends."""

import http.client
import json
import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from train.display.failures import sentence_of
from train.serve.command import KEY, ServeConfig
from train.serve.listener import Listener
from train.serve.security import check_exposed, is_loopback

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": "0.0.0.0"}, "an API key is needed; set JAXSTEER_API_KEY or give --api-key"),
        ({"host": "::"}, "an API key is needed"),
        ({"host": "no.such.host.invalid"}, "--host no.such.host.invalid: not an address"),
        ({"api_key": ""}, "--api-key must be"),
        ({"api_key": "two words"}, "--api-key must be"),
        ({"rows": 0}, "--rows must be at least 1, got 0"),
        ({"queue": -1}, "--queue must be at least 0"),
        ({"port": 65536}, "--port must be from 0 to 65535"),
        ({"timeout": float("nan")}, "--timeout must be above 0"),
        ({"strength": float("inf")}, "--strength must be from -1000 to 1000"),
    ],
)
def test_what_is_refused_before_anything_is_loaded(options, message, monkeypatch):
    monkeypatch.delenv(KEY, raising=False)
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        ServeConfig(("none",), **options).check()


def test_a_key_opens_the_server_to_other_machines(monkeypatch):
    monkeypatch.setenv(KEY, "secret")
    config = ServeConfig(("none",), host="0.0.0.0")
    config.check()
    assert (config.settings.api_key, config.settings.allowed_hosts) == ("secret", ())
    assert "secret" not in repr(config)


def test_loopback():
    assert [is_loopback(host) for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost", "0.0.0.0", "::")] == [
        *[True] * 4,
        *[False] * 2,
    ]
    check_exposed("localhost", None)


def test_an_address_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port {port}: .*; give another port, or 0 for any"):
            Listener.bind("127.0.0.1", port)


def test_without_the_extra():
    said = sentence_of(ModuleNotFoundError("No module named 'starlette'", name="starlette.applications"))
    assert said == 'the package starlette is not installed; install it with: pip install "jaxsteer[train,serve]"'


@pytest.fixture
def start(served_folder):
    """Starts a server in a process of its own; gives the process and a connection to it."""
    started = []

    def run(*options):
        command = [sys.executable, "-m", "train.serve", str(served_folder / "steered.safetensors"), "--port", "0"]
        sizes = ["--rows", "1", "--max-prompt", "48", "--max-new-tokens", "64", "--places", "1"]
        process = subprocess.Popen(
            [*command, *sizes, *options], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        started.append(process)
        printed = []
        for line in process.stdout:
            printed.append(line)
            if line.startswith("Ready: "):
                break
        else:
            raise AssertionError(f"{printed} {process.stderr.read()}")
        assert any(line.startswith("base model") and "tiny" in line for line in printed)
        return process, http.client.HTTPConnection(urlsplit(line.split()[1]).netloc, timeout=60)

    yield run
    for process in started:
        process.kill()
        process.communicate()


def ask(connection, **more):
    body = {"model": "steered", "prompt": "ab", "temperature": 0, "max_tokens": 60} | more
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    return connection.getresponse()


@pytest.mark.slow
@pytest.mark.parametrize(("told", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_server_that_is_stopped_finishes_its_answers(start, told, status):
    process, connection = start()
    whole = json.loads(ask(connection).read())["choices"][0]["text"]
    response = ask(connection, stream=True, n=4)  # one after the other
    first = response.readline()
    process.send_signal(told)
    lines = [first, *response]
    assert lines[-2:] == [b"data: [DONE]\n", b"\n"]
    pieces = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith(b"data: {")]
    assert ["".join(piece["text"] for piece in pieces if piece["index"] == i) for i in range(4)] == [whole] * 4
    printed = process.communicate(timeout=60)[1]
    assert process.returncode == status
    assert "Stopping" in printed
    assert "Traceback" not in printed


@pytest.mark.slow
def test_logs_of_a_server(start):
    process, connection = start("--log-requests")
    ask(connection).read()
    assert ask(connection, model="nothing").status == 404
    connection.close()
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=60)[1]
    assert "POST /v1/completions steered: 200" in printed
    assert "prompt: 'ab'" in printed
    assert "POST /v1/completions: 404" in printed
