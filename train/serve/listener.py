"""The socket, the server that reads it, and how both end: answers that have begun are finished first."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from train.devices import interrupts
from train.display.console import say
from train.serving.engine import Engine

GRACE_SECONDS = 30.0
"""How long answers may go on after the process was told to stop."""
KEEP_ALIVE_SECONDS = 60
"""How long a connection may be idle."""
HEAD_SECONDS = 60.0
"""How long the head of a request may take to come: clients that never end it would use up all connections."""


@dataclass(frozen=True)
class Listener:
    """A socket that has an address but does not listen yet: connections are refused until there are answers.

    socket  bound
    url     with which this machine can reach it
    """

    socket: socket.socket
    url: str

    @classmethod
    def bind(cls, host: str, port: int) -> Listener:
        """Take an address, also from servers that are still compiling.

        Raises:
            ValueError: it is not to be had.
        """
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            bound = socket.socket(family, kind, protocol)
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of an earlier server may linger
            bound.bind(address)
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)  # or another could bind before `listen`
        except (OSError, UnicodeError) as error:
            raise _no_address(host, port, error) from None
        name = f"[{host}]" if family == socket.AF_INET6 else host
        return cls(bound, f"http://{name}:{bound.getsockname()[1]}")

    def listen(self) -> None:
        """Let clients connect.

        Raises:
            ValueError: another program listens there by now.
        """
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # for the server that comes after this one
        try:
            self.socket.listen()  # here, because uvloop does not report that it fails
        except OSError as error:
            raise _no_address(*self.socket.getsockname()[:2], error) from None


_PORT_ERRORS = (errno.EADDRINUSE, errno.EACCES)


def _no_address(host: str, port: int, error: OSError | UnicodeError) -> ValueError:
    """The error for an address that cannot be had, with what to give instead."""
    if not isinstance(error, OSError) or error.errno not in _PORT_ERRORS:
        remedy = "give an address of this machine, such as 127.0.0.1, or 0.0.0.0 for all of them"
    else:
        remedy = "give another port, or 0 for any that is free"
    said = (error.strerror if isinstance(error, OSError) else None) or error
    return ValueError(f"--host {host} --port {port}: {said}; {remedy}")


class _Server(uvicorn.Server):
    """Leaves signals to `serve`, and says when it is ready."""

    def __init__(self, config: uvicorn.Config, ready: threading.Event | None = None) -> None:
        super().__init__(config)
        self.ready = ready or threading.Event()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        await super().startup(sockets)
        self.ready.set()


class _Connection(H11Protocol):
    """Closed when the head of a request does not come in time; uvicorn itself waits for ever."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a first request."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Wait for the rest of a head that has begun; however it comes, the time counts from its beginning."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        super().connection_lost(exc)
        self._stop()

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def make_server(app: ASGIApp) -> _Server:
    """A server for the app that handles no signals: `run(sockets=[...])` until `should_exit` is set."""
    config = uvicorn.Config(
        app,
        http=_Connection,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=5,
    )
    return _Server(config)


def serve(app: ASGIApp, engine: Engine, listener: Listener) -> None:
    """Answer requests until the process is told to stop; then refuse new ones, and finish the others.

    A second Ctrl-C ends the process at once.

    Raises:
        ValueError: another program listens at the address.
        KeyboardInterrupt: it was told by Ctrl-C.
    """
    server = make_server(app)
    told: list[int] = []

    def drain() -> None:
        engine.close(GRACE_SECONDS)
        server.should_exit = True

    def stop(number: int, frame: FrameType | None) -> None:
        if told:
            interrupts.leave(interrupts.STOPPED)
        told.append(number)
        say(f"Stopping: running answers may take up to {GRACE_SECONDS:g} s more; Ctrl-C again ends at once.")
        threading.Thread(target=drain, name="drain", daemon=True).start()

    def announce() -> None:
        server.ready.wait()
        say(f"Ready: {listener.url} (Ctrl-C stops)", stderr=False)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    threading.Thread(target=announce, name="announce", daemon=True).start()
    try:
        listener.listen()
        server.run(sockets=[listener.socket])
    finally:
        engine.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    if signal.SIGINT in told:
        raise KeyboardInterrupt
