"""Clients of a server by the dozen: patient ones, those that leave, read slowly, or send what is no request."""

import asyncio
import json
import random
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx2
from unbatched import Question

KINDS = {"whole": 48, "stream": 24, "several": 5, "sampled": 5, "leaves": 6, "gives_up": 2, "slow": 4, "wrong": 6}
"""How many of a hundred clients do what."""

JSON = {"content-type": "application/json"}
NOT_REQUESTS: list[tuple[bytes, Mapping[str, str], int]] = [
    (b"", JSON, 400),
    (b"{", JSON, 400),
    (b"\xff\xfe{}", JSON, 400),
    (b"[" * 50_000, JSON, 400),
    (b'{"a":' * 10_000, JSON, 400),
    (b'{"model": "MODEL", "prompt": "a", "temperature": NaN}', JSON, 400),
    (b'{"model": "MODEL", "prompt": "a", "steering_strength": Infinity}', JSON, 400),
    (b'{"model": "MODEL", "prompt": "a", "steering_strength": 1e400}', JSON, 400),
    (b'{"model": "MODEL", "prompt": "a", "n": 1000000000}', JSON, 400),
    (b'{"model": "MODEL", "prompt": "a", "max_tokens": -1}', JSON, 400),
    (b'{"model": "MODEL", "prompt": "a", "stop": [' + b'"x",' * 5000 + b'"x"]}', JSON, 400),
    (b'{"model": "MODEL", "prompt": "\\ud800"}', JSON, 400),
    (b'{"model": "MODEL", "prompt": [' + b"1," * 5000 + b"1]}", JSON, 400),
    (b'{"model": "MODEL", "prompt": [999999]}', JSON, 400),
    (b'{"model": "MODEL", "prompt": ' + b"9" * 5000 + b"}", JSON, 400),
    (b'{"model": "nothing\\n\\u0000", "prompt": "a"}', JSON, 404),
    (b'{"model": "MODEL", "prompt": "a"}', {"content-type": "text/plain"}, 415),
    (b'{"model": "MODEL", "prompt": "' + b"a" * 100_000 + b'"}', JSON, 413),
]
"""Bodies, their headers, and the status that they deserve from a server with --max-body 65536."""


@dataclass(frozen=True)
class Visit:
    """What one client does.

    kind      of KINDS
    question  that it asks
    count     number of tokens that it wants
    more      fields of its request
    number    of the visit
    """

    kind: str
    question: Question
    count: int
    more: Mapping[str, Any] = field(default_factory=dict)
    number: int = 0

    def body(self):
        stream = self.kind in ("stream", "leaves", "slow")
        body = {"temperature": 0, "max_tokens": self.count, "stream": stream}
        return body | self.question.fields() | dict(self.more)

    @property
    def path(self):
        return "/v1/chat/completions" if self.question.chat else "/v1/completions"


@dataclass(frozen=True)
class Outcome:
    """What a client got: the texts of its answers and why they ended; none if it left."""

    visit: Visit
    answers: tuple[tuple[str, str], ...] = ()


def visits(questions, count, longest, seed):
    """As many visits, the same for one seed."""
    draw = random.Random(seed)
    kinds = draw.choices(list(KINDS), list(KINDS.values()), k=count)
    return [_visit(kind, draw.choice(questions), draw, longest, number) for number, kind in enumerate(kinds)]


def _visit(kind, question, draw, longest, number):
    tokens, more = draw.randint(1, longest), {}
    if kind == "several":
        more = {"n": draw.randint(2, 4)}
    elif kind == "sampled":
        more = {"temperature": draw.choice((0.5, 1.0)), "seed": draw.randrange(3), "top_p": draw.choice((0.9, 1.0))}
        tokens = longest
    elif kind in ("leaves", "gives_up", "slow"):
        more = {"n": 4}
        tokens = longest
    if kind in ("whole", "stream", "slow") and draw.random() < 0.2:
        more = more | ({"logprobs": True, "top_logprobs": 20} if question.chat else {"logprobs": 20})
    if kind in ("whole", "stream") and draw.random() < 0.15:
        more = more | {"stop": [draw.choice("etaoins"), draw.choice("xyz<&") * 2]}
    return Visit(kind, question, tokens, more, number)


async def all_of(url, wanted, clients=64):
    """The outcomes of visits, by `clients` clients at a time."""
    waiting, found = iter(wanted), []
    limits = httpx2.Limits(max_connections=clients, max_keepalive_connections=clients // 2)

    async def client():
        for visit in waiting:
            outcome = await _go(http, url, visit)
            found.append(outcome)

    async with httpx2.AsyncClient(base_url=url, limits=limits, timeout=600) as http, asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client())
    return found


async def _go(http, url, visit):
    match visit.kind:
        case "stream":
            return Outcome(visit, await _patiently(lambda: _streamed(http, visit)))
        case "leaves":
            await _patiently(lambda: _streamed(http, visit, pieces=random.Random(visit.number).randint(0, 6)))
        case "gives_up":
            await _given_up(http, visit)
        case "slow":
            return Outcome(visit, await _patiently(lambda: _read_slowly(url, visit)))
        case "wrong":
            await _wrong(http, visit)
        case _:
            return Outcome(visit, await _patiently(lambda: _whole(http, visit)))
    return Outcome(visit)


async def _patiently(ask):
    """What a question comes to, asked again as long as the queue is full."""
    while (found := await ask()) is None:
        await asyncio.sleep(0.05)
    return found


async def _whole(http, visit):
    response = await http.post(visit.path, json=visit.body())
    if response.status_code == 429:
        assert int(response.headers["retry-after"]) >= 1
        return None
    assert response.status_code == 200, (visit, response.text)
    text = lambda choice: choice["message"]["content"] if visit.question.chat else choice["text"]
    return tuple((text(choice), choice["finish_reason"]) for choice in response.json()["choices"])


async def _streamed(http, visit, pieces=None):
    """Read a stream, or only its first pieces."""
    async with http.stream("POST", visit.path, json=visit.body()) as response:
        if response.status_code == 429:
            return None
        assert response.status_code == 200, (visit, await response.aread())
        lines = []
        async for line in response.aiter_lines():
            if pieces is not None and len(lines) >= pieces:
                return ()
            lines += [line] * line.startswith("data: ")
    return _joined(visit, lines)


def _joined(visit, lines):
    """The answers of a stream that has come to its end."""
    assert lines[-1] == "data: [DONE]", (visit, lines)
    texts, ends = {}, {}
    for line in lines[:-1]:
        chunk = json.loads(line.removeprefix("data: "))
        assert "error" not in chunk, (visit, chunk)
        for choice in chunk["choices"]:
            index = choice["index"]
            piece = choice["delta"].get("content", "") if visit.question.chat else choice["text"]
            assert index not in ends
            texts[index] = texts.get(index, "") + piece
            if choice["finish_reason"]:
                ends[index] = choice["finish_reason"]
    return tuple((texts[index], ends[index]) for index in sorted(texts))


async def _given_up(http, visit):
    """Leave without waiting for an answer."""
    try:
        async with asyncio.timeout(random.Random(visit.number).uniform(0.0, 0.1)):
            await http.post(visit.path, json=visit.body())
    except TimeoutError:
        pass


async def _read_slowly(url, visit):
    """Read a stream with a small buffer and pauses."""
    address = urlsplit(url)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, (address.hostname, address.port))
    reader, writer = await asyncio.open_connection(sock=connection, limit=1024)
    body = json.dumps(visit.body()).encode()
    head = f"POST {visit.path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    received = b""
    while part := await reader.read(1024):
        received += part
        await asyncio.sleep(0.002)
    writer.close()
    head, _, rest = received.partition(b"\r\n\r\n")
    if b" 429 " in head.splitlines()[0]:
        return None
    assert b" 200 " in head.splitlines()[0], (visit, received)
    return _joined(visit, [line for line in _unchunked(rest).decode().split("\n") if line.startswith("data: ")])


def _unchunked(body):
    """A body without the sizes of its chunks."""
    parts = []
    while body:
        size, _, body = body.partition(b"\r\n")
        parts.append(body[: int(size, 16)])
        body = body[int(size, 16) + 2 :]
    return b"".join(parts)


async def _wrong(http, visit):
    body, headers, status = NOT_REQUESTS[visit.number % len(NOT_REQUESTS)]
    body = body.replace(b"MODEL", visit.question.model.encode())
    if visit.number % 2:  # in chunks, without a declared length
        content = body

        async def chunks():
            for start in range(0, len(content), 4096):
                yield content[start : start + 4096]

        body = chunks()
    try:
        response = await http.post("/v1/completions", content=body, headers=headers)
    except httpx2.TransportError:
        assert status == 413  # answered before the body was read, and the connection closed
        return
    assert response.status_code == status, (visit.number % len(NOT_REQUESTS), response.text)
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
