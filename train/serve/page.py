"""The page that `jaxsteer serve` shows at /: static files that may load nothing from anywhere else."""

from __future__ import annotations

import os
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

FOLDER = Path(__file__).with_name("page")

_HEADERS = {
    "content-security-policy": (
        "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # an upgraded server is seen at once; unchanged files cost a 304
}


def page_routes() -> list[BaseRoute]:
    """Routes for the page at / and its files at /static; they hold no secrets and need no API key."""
    return [Route("/", _index, methods=["GET"]), Mount("/static", _Files(directory=FOLDER))]


async def _index(request: Request) -> Response:
    return FileResponse(FOLDER / "index.html", headers=_HEADERS)


class _Files(StaticFiles):
    """Static files with the page's headers."""

    def file_response(
        self, full_path: str | os.PathLike[str], stat_result: os.stat_result, scope: Scope, status_code: int = 200
    ) -> Response:
        response = super().file_response(full_path, stat_result, scope, status_code)
        response.headers.update(_HEADERS)
        return response
