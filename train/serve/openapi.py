"""The API's description in OpenAPI 3.1, from the models of its requests and the types of its replies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, TypeAdapter
from typing_extensions import TypedDict

Schema = dict[str, Any]

_REFERENCE = "#/components/schemas/{model}"

_ERRORS = {
    400: "The request cannot be answered as it is.",
    401: "No API key, or another one than the server's.",
    403: "The server was started without this function.",
    404: "There is no such model.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    415: "The body is not said to be JSON.",
    429: "The queue is full; the header Retry-After says when to try again.",
    500: "An error of the server.",
    503: "The server is being stopped.",
    504: "The answer was not complete in time.",
}


_EVENT: Schema = {
    "type": "object",
    "description": "Each event: a chunk of the response, or an error, as JSON; the last one's data is [DONE].",
    "properties": {"data": {"type": "string"}},
    "required": ["data"],
}


class ErrorObject(TypedDict):
    """What was wrong, and with which field of the request."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(TypedDict):
    """The response to a request that failed."""

    error: ErrorObject


@dataclass(frozen=True)
class Operation:
    """A route of the API.

    method    GET or POST
    path      with {name} for a parameter, which may have slashes
    endpoint  that answers
    summary   one line
    reply     type of the JSON in the response; None for text
    body      of the request; None for none
    errors    statuses of errors
    streams   whether the response may be a stream of events
    """

    method: str
    path: str
    endpoint: Callable
    summary: str
    reply: Any = None
    body: type[BaseModel] | None = None
    errors: tuple[int, ...] = (401,)
    streams: bool = False


def describe(operations: Sequence[Operation], version: str, models: Sequence[str]) -> Schema:
    """The description of the operations, as an object for JSON.

    Args:
        operations: the API.
        version: of jaxsteer.
        models: names that requests may give now, which are examples.
    """
    kinds: dict[str, Any] = {"Error": ErrorReply}
    for operation in operations:
        kinds |= {kind.__name__: kind for kind in (operation.body, operation.reply) if kind is not None}
    inputs = [(name, "validation", TypeAdapter(kind)) for name, kind in kinds.items()]
    schemas, shared = TypeAdapter.json_schemas(inputs, ref_template=_REFERENCE)  # type: ignore[arg-type]
    components = shared.get("$defs", {})
    components |= {name: schema for (name, _), schema in schemas.items() if name not in components}
    for body in (operation.body for operation in operations if operation.body is not None):
        if "model" in body.model_fields:
            components[body.__name__]["properties"]["model"]["examples"] = list(models)
    paths: dict[str, Schema] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "jaxsteer",
            "version": version,
            "description": "OpenAI's protocol for a language model and the adapters that steer it.",
        },
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
    }


def _operation(operation: Operation) -> Schema:
    described: Schema = {
        "operationId": operation.endpoint.__name__,
        "summary": operation.summary,
        "responses": {"200": _success(operation)} | {str(status): _error(status) for status in operation.errors},
    }
    if operation.body is not None:
        described["requestBody"] = {"required": True, "content": {"application/json": _schema(operation.body)}}
    if "{" in operation.path:
        name = operation.path.partition("{")[2].partition("}")[0]
        parameter = {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        described["parameters"] = [parameter]
    return described


def _success(operation: Operation) -> Schema:
    content: Schema = {"text/plain": {"schema": {"type": "string"}}}
    if operation.reply is not None:
        content = {"application/json": _schema(operation.reply)}
    if operation.streams:
        content["text/event-stream"] = {"schema": _EVENT}
    return {"description": "Success.", "content": content}


def _error(status: int) -> Schema:
    described: Schema = {"description": _ERRORS[status], "content": {"application/json": _schema("Error")}}
    if status in (429, 503):
        described["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds to wait."}}
    return described


def _schema(kind: Any) -> Schema:
    name = kind if isinstance(kind, str) else kind.__name__
    return {"schema": {"$ref": _REFERENCE.format(model=name)}}
