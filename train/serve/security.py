"""Who may ask, and how much: the API key, the size of a body, and the address that the server listens on."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import socket

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from train.serve.errors import ApiError

OPEN = ("/", "/health", "/openapi.json")
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
