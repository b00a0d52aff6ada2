"""What bytes on a socket, pages of other sites, and paths of adapters can do to a server: nothing."""

import json
import socket
from contextlib import closing
from urllib.parse import quote, urlsplit

import pytest
from tiny_server import GREEDY, eventually, idle, serving

from train.serve import listener

BODY = json.dumps(GREEDY | {"prompt": "ab", "max_tokens": 4}).encode()
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
WHOLE = POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
LAST = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


def sent(url, data):
    """All that comes back until the server closes the connection."""
    address = urlsplit(url)
    with closing(socket.create_connection((address.hostname, address.port), timeout=30)) as connection:
        received = b""
        try:
            connection.sendall(data)
            while part := connection.recv(65536):
                received += part
        except ConnectionError:  # closed before it had read everything
            pass
        return received


@pytest.mark.parametrize(
    ("data", "answered"),
    [
        (b"", 0),
        (b"POST /v1/comp", 0),
        (POST + b"X-a: ", 0),
        (WHOLE + b"GET /v1/mod", 1),
    ],
    ids=["nothing", "a line", "headers", "a second request"],
)
def test_heads_that_never_end_do_not_keep_connections(app, monkeypatch, data, answered):
    monkeypatch.setattr(listener, "HEAD_SECONDS", 0.2)
    monkeypatch.setattr(listener, "KEEP_ALIVE_SECONDS", 0.2)
    with serving(app) as url:
        assert sent(url, data).count(b" 200 ") == answered


def test_requests_in_a_row_on_one_connection(url):
    """As many answers, in their order."""
    received = sent(url, WHOLE * 5 + LAST)
    assert received.count(b"HTTP/1.1 200") == 6
    assert received.endswith(b'{"status":"ok"}')


@pytest.mark.parametrize(
    "data",
    [
        bytes(range(1, 256)) + b"\r\n\r\n",
        POST + b"Content-Length: -5\r\n\r\nabc" + LAST,
        POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef" + LAST,
        POST + b"".join(b"X-%d: %s\r\n" % (i, b"a" * 1000) for i in range(1000)) + b"\r\n" + LAST,
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n" + LAST,
        b"GET /health HTTP/1.1\r\n\r\n" + LAST,
    ],
    ids=["bytes", "a length below 0", "two lengths", "a megabyte of headers", "two hosts", "no host"],
)
def test_what_is_no_http_ends_the_connection(url, data):
    received = sent(url, data)
    assert b" 200 " not in received
    assert len(received) < 2000


def test_an_error_does_not_repeat_a_long_path(url):
    received = sent(url, b"GET /" + b"a" * 50_000 + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert b" 404 " in received[:30]
    assert len(received) < 2000


@pytest.mark.parametrize("path", ["completions", "chat/completions", "effects", "load_lora_adapter"])
@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a"])
def test_pages_of_other_sites_cannot_post(client, engine, path, kind):
    """A browser sends these types without asking the server first; for JSON it asks, and is not encouraged."""
    origin, before = {"origin": "https://evil.example"}, engine.stats().submitted
    assert client.post(f"/v1/{path}", content=BODY, headers=origin | {"content-type": kind}).status_code == 415
    asked = origin | {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    for response in (client.options(f"/v1/{path}", headers=asked), client.get("/v1/models", headers=origin)):
        assert not [name for name in response.headers if name.startswith("access-control-")]
    assert engine.stats().submitted == before


def test_paths_that_lead_out_of_the_allowed_folder(served_folder, client, tmp_path):
    """There are files at all of them, or none: the answer is the same."""
    inside, outside = served_folder / "inside", tmp_path / "outside.safetensors"
    inside.mkdir()
    outside.write_bytes((served_folder / "other.safetensors").read_bytes())
    (inside / "link.safetensors").symlink_to(outside)
    (inside / "steering.safetensors").symlink_to(outside)
    (inside / "loop").symlink_to(inside / "loop")
    paths = [outside, tmp_path / "absent", inside / ".." / ".." / outside.name, inside / "link.safetensors", inside]
    paths += [inside / "loop", "/dev/zero", "/proc/self/environ", "~", "file:///etc/passwd", f"{outside}\0.safetensors"]
    for path in map(str, paths):
        response = client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": path})
        assert response.status_code == 400, path
        assert "not in a folder that adapters may be loaded from" in response.json()["error"]["message"]


@pytest.mark.parametrize("name", ["", " a", "a\nb", "\0", "\u202e", "a" * 101, "tiny"])
def test_names_that_nobody_could_type(served_folder, client, name):
    body = {"lora_name": name, "lora_path": str(served_folder / "other.safetensors")}
    assert client.post("/v1/load_lora_adapter", json=body).status_code == 400


@pytest.mark.parametrize("name", ["a/b", "../x", "a#2", "?x=1", "<b>", 'a"} 99', "é"])
def test_names_are_only_names(served_folder, client, engine, name):
    body = {"lora_name": name, "lora_path": str(served_folder / "other.safetensors")}
    assert client.post("/v1/load_lora_adapter", json=body).status_code == 200
    try:
        assert client.get(f"/v1/models/{quote(name, safe='')}").json()["id"] == name
        assert client.post("/v1/completions", json=GREEDY | {"model": name, "prompt": "a"}).status_code == 200
        assert "\njaxsteer_running 0.0" in client.get("/metrics").text
    finally:
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": name}).status_code == 200
    eventually(lambda: idle(engine))
