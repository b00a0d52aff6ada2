"""`jaxsteer serve` as it is typed: what it refuses, how it starts, and how it ends."""

import http.client
import json
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
from tiny_model import TINY

from train.display.failures import sentence_of
from train.serve.command import KEY, ServeConfig, check_memory
from train.serve.listener import Listener, serve
from train.serve.security import check_exposed, is_loopback

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": "0.0.0.0"}, "an API key is needed; set JAXSTEER_API_KEY or give --api-key"),
        ({"host": "::"}, "an API key is needed"),
        ({"host": "no.such.host.invalid"}, "--host no.such.host.invalid: not an address"),
        ({"host": "a..b"}, "--host a..b: not an address"),
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


def test_an_address_is_taken_from_the_start_and_free_at_the_end():
    """A server that still compiles has its address; what is left of its connections keeps nobody out."""
    first = Listener.bind("127.0.0.1", 0)
    host, port = first.socket.getsockname()
    for _ in range(2):
        with pytest.raises(ValueError, match=f"--port {port}: .*; give another port"):
            Listener.bind(host, port)
        first.listen()
        with socket.create_connection((host, port)):
            first.socket.accept()[0].close()  # the side that closes first keeps the connection for a while
        first.socket.close()
        first = Listener.bind(host, port)
    first.socket.close()


def test_a_program_that_listens_at_the_address_meanwhile():
    listener = Listener.bind("127.0.0.1", 0)
    listener.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as where the system lets both have it
    with socket.create_server(listener.socket.getsockname()) as other:
        with pytest.raises(ValueError, match=f"--port {other.getsockname()[1]}: .*; give another port"):
            serve(None, SimpleNamespace(close=lambda *grace: None), listener)
        assert listener.url.endswith(f":{other.getsockname()[1]}")


@pytest.mark.parametrize("host", ["192.0.2.1", "a..b", "no.such.host.invalid"])
def test_an_address_of_another_machine(host):
    with pytest.raises(ValueError, match=rf"--host {host} --port 0: .*; give an address of this machine, such as"):
        Listener.bind(host, 0)


def test_rows_that_no_memory_has_room_for():
    check_memory(ServeConfig(("none",)), TINY)
    with pytest.raises(ValueError, match=r"1,000,000,000 answers at a time, with 1,024 .* GB; lower --rows"):
        check_memory(ServeConfig(("none",), rows=10**9), TINY)
    with pytest.raises(ValueError, match=r"100,000,000,000 tokens of prompt"):
        check_memory(ServeConfig(("none",), max_prompt=10**11), TINY)


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
