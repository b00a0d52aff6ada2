"""GET /v1/models: what can be asked, and how each adapter steers; and adapters that come and go."""

from __future__ import annotations

from typing import Any, Literal

from anyio import to_thread
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from typing_extensions import TypedDict

from jaxsteer.plans import format_plan
from train.serve.errors import ApiError, bad_request
from train.serve.protocol import LoadRequest, UnloadRequest
from train.serve.service import Service, of_engine, read, service_of, unknown_model
from train.serving.engine import EngineError
from train.serving.models import Refused, Served, UnknownModel


class SlotEntry(TypedDict):
    """A slot of an adapter's plan; `steering_strength` names it."""

    name: str
    method: str
    sites: list[str]
    layers: list[int]
    positions: str


class SteeringEntry(TypedDict):
    """How an adapter steers, and how it was trained to be asked."""

    slots: list[SlotEntry]
    template: str
    chat: bool
    max_new_tokens: int | None
    strength: float  # of requests that do not give one


class ModelEntry(TypedDict):
    """A model that requests may name: the base, or an adapter, whose parent is the base."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    parent: str | None
    steering: SteeringEntry | None


class ModelList(TypedDict):
    """All models, the base first."""

    object: Literal["list"]
    data: list[ModelEntry]


async def models(request: Request) -> Response:
    """All models."""
    service = service_of(request)
    entries = []
    for name in service.engine.roster.names():
        try:
            entries.append(_entry(service, service.engine.roster.get(name)))
        except UnknownModel:
            continue  # unloaded just now
    return JSONResponse({"object": "list", "data": entries})


async def model(request: Request) -> Response:
    """One model."""
    service = service_of(request)
    return JSONResponse(_entry(service, service.served(request, request.path_params["model"])))


def _entry(service: Service, served: Served) -> ModelEntry:
    roster = service.engine.roster
    count = roster.loaded.config.layers
    slots: list[SlotEntry] = [
        {
            "name": slot.name,
            "method": format_plan((slot,))[0].partition(" @ ")[0],
            "sites": list(slot.sites),
            "layers": list(slot.active_layers(count)),
            "positions": str(slot.positions),
        }
        for slot in served.plan
    ]
    steering: SteeringEntry = {
        "slots": slots,
        "template": served.template,
        "chat": served.chat,
        "max_new_tokens": served.max_new_tokens,
        "strength": service.settings.strength,
    }
    adapter = served.adapter is not None
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "jaxsteer",
        "parent": roster.base.name if adapter else None,
        "steering": steering if adapter else None,
    }


async def load(request: Request) -> Response:
    """Serve one more steering file."""
    service, body = _loading(request), await read(request, LoadRequest)
    await _change(service.engine.load, body.lora_name, body.lora_path)
    return PlainTextResponse(f"Success: adapter '{body.lora_name}' is served.")


async def unload(request: Request) -> Response:
    """Stop serving an adapter."""
    service, body = _loading(request), await read(request, UnloadRequest)
    await _change(service.engine.unload, body.lora_name)
    return PlainTextResponse(f"Success: adapter '{body.lora_name}' is no longer served.")


def _loading(request: Request) -> Service:
    """The service, if adapters may come and go.

    Raises:
        ApiError: 403.
    """
    service = service_of(request)
    if not service.settings.loading:
        raise ApiError(
            403,
            "Adapters cannot be loaded or unloaded: the server was started without --adapter-folders",
            code="loading_disabled",
        )
    return service


async def _change(change: Any, *arguments: str) -> None:
    """Have the engine load or unload on a thread, which may take long.

    Raises:
        ApiError: it does not; 404 for an unknown name.
    """
    try:
        await to_thread.run_sync(change, *arguments)
    except UnknownModel as error:
        raise unknown_model(error) from None
    except Refused as error:
        raise bad_request(str(error), code="adapter_refused") from None
    except EngineError as error:
        raise of_engine(error) from None
