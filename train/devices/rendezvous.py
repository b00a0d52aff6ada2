"""The processes of a run find each other before JAX joins them, so that a missing one can be named.

JAX waits in silence for processes that never come, and ends those that did come without a word that a user could act
on. So process 0 listens at the coordinator's address first, and the others report to it with their number and host;
once all are there, it lets them go, and JAX takes the address over.
"""

from __future__ import annotations

import json
import platform
import selectors
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

NOTICE_SECONDS = 10.0
"""Time between two lines that say who is waited for."""

_HELLO, _RETRY_SECONDS = "jaxsteer", 0.2


@dataclass(frozen=True)
class Party:
    """This process among those of a run.

    host, port  of process 0
    processes   how many there are
    process     which one this is, from 0
    """

    host: str
    port: int
    processes: int
    process: int

    @property
    def address(self) -> str:
        """As a user writes it."""
        return f"{self.host}:{self.port}"


@dataclass
class Patience:
    """How long to wait, and how to say so.

    seconds  until the waiting is given up
    say      takes a line for the user
    """

    seconds: float
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)
    clock: Callable[[], float] = time.monotonic
    _began: float = field(init=False)
    _said: float = field(init=False)

    def __post_init__(self) -> None:
        """Begin to wait."""
        self._began = self._said = self.clock()

    @property
    def left(self) -> float:
        """Seconds left."""
        return self._began + self.seconds - self.clock()

    def notice(self, text: Callable[[], str]) -> None:
        """Say what is waited for, if nothing was said for a while."""
        if self.clock() - self._said >= NOTICE_SECONDS:
            self._said = self.clock()
            spent = self.clock() - self._began
            self.say(f"{text()} ({spent:.0f} s; up to {self.seconds:.0f} s, --distributed.timeout)")


def party_of(address: str, processes: int, process: int) -> Party:
    """The settings of a process, checked.

    Raises:
        ValueError: no host:port, or numbers that do not belong together.
    """
    host, port = split_address(address)
    if processes < 1:
        raise ValueError(f"--distributed.processes {processes}: need at least 1")
    if not 0 <= process < processes:
        raise ValueError(f"--distributed.process {process}: need 0 to {processes - 1}, because there are {processes}")
    return Party(host, port, processes, process)


def split_address(address: str) -> tuple[str, int]:
    """Host and port of "host:port", or of "[host]:port" for an IPv6 address.

    Raises:
        ValueError: another form.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not (host and port.isdecimal() and 0 < int(port) < 65536):
        raise ValueError(
            f"distributed: the coordinator is {address!r}, need host:port of process 0, such as 10.0.0.1:1234 "
            "(--distributed.coordinator or JAX_COORDINATOR_ADDRESS)"
        )
    return host, int(port)


def meet(party: Party, patience: Patience) -> None:
    """Return once all processes are there.

    Raises:
        ValueError: some did not come in time; two have the same number; they disagree on how many they are.
    """
    if party.processes > 1:
        (_receive if party.process == 0 else _report)(party, patience)


def _receive(party: Party, patience: Patience) -> None:
    """Process 0: collect the others' reports."""
    came: dict[int, tuple[str, socket.socket]] = {}

    def waiting() -> str:
        missing = [str(number) for number in range(1, party.processes) if number not in came]
        there = ", ".join(f"{number} on {host}" for number, (host, _) in sorted(came.items()))
        return (
            f"process 0 at {party.address} waits for {len(missing)} of {party.processes} processes: "
            f"{', '.join(missing[:20])}{', ...' * (len(missing) > 20)}; "
            f"{f'there are {there}' if there else 'none has come'}"
        )

    try:
        with _listen(party) as server:
            while len(came) < party.processes - 1:
                if patience.left <= 0:
                    raise _give_up(waiting(), patience)
                patience.notice(waiting)
                came = {number: one for number, one in came.items() if not _gone(one[1])}
                for number, host, connection in _arrivals(server, party, min(_RETRY_SECONDS, patience.left)):
                    if number in came:
                        _answer(connection, f"there is a process {number} already, on {came[number][0]}")
                        raise ValueError(
                            f"distributed: two processes say --distributed.process {number}: on {came[number][0]} and "
                            f"on {host}; each needs its own"
                        )
                    came[number] = (host, connection)
    except BaseException:
        for _, connection in came.values():
            _answer(connection, "process 0 has given up; its own output says why")
        raise
    for _, connection in came.values():
        _answer(connection, "go")


def _listen(party: Party) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    try:
        family = socket.AF_INET6 if both else socket.AF_INET
        server = socket.create_server(("", party.port), family=family, dualstack_ipv6=both, backlog=1024)
    except OSError as error:
        raise ValueError(
            f"--distributed.coordinator {party.address}: process 0 cannot listen on port {party.port} of this machine, "
            f"{platform.node()} ({error.strerror}); choose another port"
        ) from None
    server.setblocking(False)
    return server


def _arrivals(server: socket.socket, party: Party, seconds: float) -> list[tuple[int, str, socket.socket]]:
    """(number, host, connection) of the processes that reported within some seconds; strangers are sent away.

    Raises:
        ValueError: a process that believes in another number of processes.
    """
    with selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)
        if not selector.select(max(0.0, seconds)):
            return []
    connection, _ = server.accept()
    connection.settimeout(5.0)
    try:
        hello = json.loads(_line(connection))
        number, host, processes = int(hello[_HELLO]), str(hello["host"]), int(hello["processes"])
    except (OSError, ValueError, KeyError, TypeError):
        connection.close()
        return []
    if processes != party.processes or not 0 < number < processes:
        _answer(connection, f"process 0 was started with --distributed.processes {party.processes}")
        raise ValueError(
            f"distributed: process {number} on {host} was started with --distributed.processes {processes}, process 0 "
            f"with {party.processes}; all need the same"
        )
    return [(number, host, connection)]


def _report(party: Party, patience: Patience) -> None:
    """Any other process: report to process 0 and wait for its word."""
    hello = {_HELLO: party.process, "host": platform.node(), "processes": party.processes}
    reason = "no connection yet"
    waiting = lambda: f"process {party.process} waits for process 0 at {party.address}: {reason}"
    while patience.left > 0:
        patience.notice(waiting)
        try:
            with socket.create_connection((party.host, party.port), timeout=min(5.0, patience.left)) as connection:
                connection.sendall(json.dumps(hello).encode() + b"\n")
                reason = "it waits for other processes"
                word = _word(connection, patience, waiting)
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(min(_RETRY_SECONDS, max(0.0, patience.left)))
            continue
        if word == "go":
            return
        if word:
            raise ValueError(f"distributed: {word} (process {party.process}, at {party.address})")
        reason = "it hung up"  # it ended, or something else listens there
        time.sleep(min(_RETRY_SECONDS, max(0.0, patience.left)))
    raise _give_up(waiting(), patience)


def _word(connection: socket.socket, patience: Patience, waiting: Callable[[], str]) -> str:
    """What process 0 answers; empty if it hung up.

    Raises:
        OSError: nothing in time.
    """
    connection.settimeout(1.0)
    while patience.left > 0:
        patience.notice(waiting)
        with suppress(TimeoutError):
            return _line(connection)
    raise TimeoutError("it waits for other processes")


def _line(connection: socket.socket) -> str:
    """A line that the other side sends, of at most 1,000 bytes."""
    data = b""
    while not data.endswith(b"\n") and len(data) < 1000:
        if not (more := connection.recv(1000)):
            break
        data += more
    return data.decode("utf-8", "replace").strip()


def _gone(connection: socket.socket) -> bool:
    """Whether the other side hung up, which it does if it ends."""
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.setblocking(True)


def _answer(connection: socket.socket, word: str) -> None:
    """Send a line and hang up."""
    with suppress(OSError), connection:
        connection.sendall(word.encode() + b"\n")


def _give_up(text: str, patience: Patience) -> ValueError:
    return ValueError(
        f"distributed: {text}. Given up after {patience.seconds:.0f} s (--distributed.timeout). All processes need the "
        "same coordinator and number of processes, and each its own index; --distributed.join no runs this one alone"
    )
