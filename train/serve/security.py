"""Who may ask, and how much: the API key, the size of a body, and the address that the server listens on."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import socket
from collections.abc import Sequence

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from train.serve.errors import ApiError

OPEN = ("/", "/health")
"""Paths that need no key, besides those of the page's files: they tell nothing about models and requests."""
PAGE_FILES = "/static/"

BODY_SECONDS = 60.0
"""How long a client may take to send a body."""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address.

    Raises:
        ValueError: there is no such host.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"--host {host}: not an address of this machine ({error})") from None
    return all(ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in found)


def check_exposed(host: str, api_key: str | None) -> None:
    """Refuse to serve everybody who can reach this machine.

    Raises:
        ValueError: other machines can reach the address, and there is no key; or the key cannot be sent in a header.
    """
    if api_key is not None and (not api_key.isascii() or not api_key.isprintable() or " " in api_key or not api_key):
        raise ValueError("--api-key must be printable ASCII characters without spaces, at least one")
    if api_key is None and not is_loopback(host):
        raise ValueError(
            f"--host {host}: other machines can reach this address, so an API key is needed; set JAXSTEER_API_KEY or "
            "give --api-key, or listen on 127.0.0.1 only"
        )


class RequireKey:
    """Middleware: requests must have `Authorization: Bearer KEY`, except those for the page and for health."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app, self._key = app, api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 401."""
        path = scope.get("path", "")
        if scope["type"] != "http" or path in OPEN or path.startswith(PAGE_FILES) or self._has_key(scope):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            401,
            "Incorrect API key provided, or none: send the header 'Authorization: Bearer KEY'",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await error.response()(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        return hmac.compare_digest(key.strip(), self._key) and scheme.lower() == b"bearer"


class LimitBody:
    """Middleware: bodies of at most `max_bytes`, counted as they come, within `BODY_SECONDS`."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; what reads its body gets 413 or 408 as an `ApiError`."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._declared(scope) > self._max_bytes:
            await self._too_large().response()(scope, receive, send)
            return
        size, complete = 0, False

        async def counted() -> Message:
            nonlocal size, complete
            if complete:  # what comes now is the client's disconnection, at any time
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), BODY_SECONDS)
            except TimeoutError:
                raise ApiError(408, f"The body did not come within {BODY_SECONDS:g} seconds", code="timeout") from None
            size += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if size > self._max_bytes:
                raise self._too_large()
            return message

        await self._app(scope, counted, send)

    @staticmethod
    def _declared(scope: Scope) -> int:
        value = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        return int(value) if value.isdigit() else 0

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"The body is larger than {self._max_bytes:,} bytes (the server's --max-body)", code="body_too_large"
        )


LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
"""Names by which a server on the loopback interface may be asked for."""


class CheckHost:
    """Middleware: the header Host must name this server.

    A page of another site whose name has come to stand for 127.0.0.1 is one origin with this server to a browser, which
    would let it read answers.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self._app, self._hosts = app, frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 421."""
        if scope["type"] == "http" and self._name(scope) not in self._hosts:
            error = ApiError(421, f"The header Host must be one of {', '.join(sorted(self._hosts))}", code="wrong_host")
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    @staticmethod
    def _name(scope: Scope) -> str:
        """The host in the header, without a port and the brackets of an IPv6 address."""
        value = next((value for name, value in scope["headers"] if name == b"host"), b"").decode("latin-1").lower()
        if value.startswith("["):
            return value[1:].partition("]")[0]
        return value.rpartition(":")[0] if value.count(":") == 1 else value


_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",  # an upgraded page is seen at once; an unchanged file costs a 304
}


class PageHeaders:
    """Middleware: the page may load nothing from elsewhere, and no other page may show it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and add headers to its response."""

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                for name, value in _PAGE_HEADERS.items():
                    MutableHeaders(scope=message).setdefault(name, value)
            await send(message)

        await self._app(scope, receive, with_headers if scope["type"] == "http" else send)
