"""The ASGI application: its routes, what every request passes, and how errors are answered."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Literal

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from typing_extensions import TypedDict

from jaxsteer import __version__
from train.serve import catalogue
from train.serve.chats import chat_completions
from train.serve.completions import completions
from train.serve.effects import EffectsReply, token_effects
from train.serve.errors import ApiError, internal_error
from train.serve.metrics import CONTENT_TYPE, Metrics
from train.serve.observe import CLIENT_LEFT, Observe
from train.serve.openapi import Operation, describe
from train.serve.protocol import ChatRequest, CompletionRequest, EffectsRequest, LoadRequest, UnloadRequest
from train.serve.replies import ChatCompletion, Completion
from train.serve.security import CheckHost, LimitBody, PageHeaders, RequireKey
from train.serve.service import ClientLeft, ServeSettings, Service, service_of
from train.serving.engine import Engine

PAGE = Path(__file__).parent / "page"
"""The files of the page."""

_POSTED = (400, 401, 404, 408, 413, 415, 429, 500, 503, 504)
_LOADING = (400, 401, 403, 404, 408, 413, 415, 500, 503)
"""Statuses of errors."""


class Health(TypedDict):
    """Whether the server takes requests."""

    status: Literal["ok", "draining"]


async def health(request: Request) -> Response:
    """200 while the server takes requests, 503 once it is being stopped."""
    if service_of(request).engine.draining:
        return JSONResponse({"status": "draining"}, 503)
    return JSONResponse({"status": "ok"})


async def metrics(request: Request) -> Response:
    """Figures for Prometheus."""
    return Response(service_of(request).metrics.text(), media_type=CONTENT_TYPE)


async def page(request: Request) -> Response:
    """The page."""
    if not (PAGE / "index.html").is_file():
        raise ApiError(404, "This installation has no page")
    return FileResponse(PAGE / "index.html")


OPERATIONS = (
    Operation("GET", "/v1/models", catalogue.models, "All models", catalogue.ModelList, errors=(401, 500)),
    Operation("GET", "/v1/models/{model}", catalogue.model, "One model", catalogue.ModelEntry, errors=(401, 404, 500)),
    Operation(
        "POST", "/v1/completions", completions, "Continue prompts", Completion, CompletionRequest, _POSTED, streams=True
    ),
    Operation(
        "POST",
        "/v1/chat/completions",
        chat_completions,
        "Answer a conversation",
        ChatCompletion,
        ChatRequest,
        _POSTED,
        streams=True,
    ),
    Operation(
        "POST", "/v1/effects", token_effects, "What steering does to each token", EffectsReply, EffectsRequest, _POSTED
    ),
    Operation("POST", "/v1/load_lora_adapter", catalogue.load, "Serve one more adapter", None, LoadRequest, _LOADING),
    Operation(
        "POST", "/v1/unload_lora_adapter", catalogue.unload, "Stop serving an adapter", None, UnloadRequest, _LOADING
    ),
    Operation("GET", "/health", health, "Whether the server takes requests", Health, errors=(500,)),
    Operation("GET", "/metrics", metrics, "Figures for Prometheus", errors=(401, 500)),
)
"""The API."""


async def openapi(request: Request) -> Response:
    """The description of the API."""
    return JSONResponse(describe(OPERATIONS, __version__, service_of(request).engine.roster.names()))


def make_app(engine: Engine, settings: ServeSettings | None = None) -> Starlette:
    """The application for an engine that has been started.

    Args:
        engine: that answers.
        settings: how requests are answered.
    """
    settings = settings or ServeSettings()
    service = Service(engine, settings, Metrics(engine.stats), __version__)
    paths = [operation.path for operation in OPERATIONS]
    middleware = [
        Middleware(Observe, metrics=service.metrics, routes=paths),
        Middleware(PageHeaders),
        *([Middleware(CheckHost, hosts=settings.allowed_hosts)] if settings.allowed_hosts else []),
        *([Middleware(RequireKey, api_key=settings.api_key)] if settings.api_key else []),
        Middleware(LimitBody, max_bytes=settings.max_body),
    ]
    app = Starlette(routes=_routes(), middleware=middleware, exception_handlers=_HANDLERS)
    app.state.service = service
    return app


def _routes() -> list[BaseRoute]:
    routes: list[BaseRoute] = [
        Route(each.path.replace("}", ":path}"), each.endpoint, methods=[each.method]) for each in OPERATIONS
    ]
    routes += [Route("/openapi.json", openapi), Route("/", page)]
    return [*routes, Mount("/static", StaticFiles(directory=PAGE, check_dir=False))]


async def _refused(request: Request, error: ApiError) -> Response:
    return error.response()


async def _no_route(request: Request, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path:.200}: {error.detail}"
    return ApiError(error.status_code, message, headers=error.headers).response()


async def _left(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_LEFT)


async def _failed(request: Request, error: Exception) -> Response:
    return internal_error().response()


_HANDLERS: dict[Any, Callable[[Request, Any], Awaitable[Response]]] = {
    ApiError: _refused,
    HTTPException: _no_route,
    ClientLeft: _left,
    ClientDisconnect: _left,
    Exception: _failed,
}
