"""Errors as OpenAI writes them: {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from starlette.responses import JSONResponse

from jaxsteer.plans import did_you_mean


class ApiError(Exception):
    """An answer other than 200.

    Args:
        status: of the HTTP response.
        message: for the client's user.
        param: the field of the request that is wrong, if it is one.
        code: short name of the error that programs can compare.
        headers: further ones of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = "rate_limit_error" if self.status == 429 else "invalid_request_error"
        kind = "server_error" if self.status >= 500 else kind
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The error as a response."""
        return JSONResponse(self.body(), self.status, headers=dict(self.headers or {}))


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request cannot be answered as it is."""
    return ApiError(400, message, param=param, code=code)


def internal_error() -> ApiError:
    """500: what happened is in the log, not in the response."""
    return ApiError(500, "The server had an error while processing the request", code="internal_error")


def invalid(kind: type[BaseModel], error: ValidationError) -> ApiError:
    """400 for a body that is not of its kind: the first thing that is wrong, and what would be right."""
    first = error.errors(include_url=False, include_input=False)[0]
    path, field = _locate(kind, first["loc"])
    match first["type"]:
        case "json_invalid":
            return bad_request(f"The body is not valid JSON ({first['ctx']['error']})", code="invalid_json")
        case "conflict":
            return bad_request(first["ctx"]["message"], first["ctx"]["param"], "invalid_value")
        case "missing":
            return bad_request(f"Missing required parameter: '{path}'", path, "missing_required_parameter")
        case "extra_forbidden":
            name = str(first["loc"][-1])
            path = f"{path}.{name}" if path else name
            hint = did_you_mean(name, _known(kind, first["loc"]))
            return bad_request(f"Unrecognized request argument supplied: '{path}'{hint}", path, "unknown_parameter")
    if not path:
        return bad_request("The body must be a JSON object", code="invalid_type")
    allowed = field.description if field is not None and field.description else first["msg"].lower()
    return bad_request(f"'{path}' must be {allowed}", path, "invalid_value")


def _locate(kind: type[BaseModel], location: Sequence[int | str]) -> tuple[str, FieldInfo | None]:
    """The path of a field, such as messages[0].content, and the field; without names of a union's members."""
    path, field, models = "", None, [kind]
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
            continue
        found = next((model.model_fields[part] for model in models if part in model.model_fields), None)
        if found is not None:
            path = f"{path}.{part}" if path else part
            field, models = found, list(_models(found.annotation))
        elif models != [kind]:
            break  # inside a member of a union, or the key of an object
    return path, field


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models in the type of a field."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)


def _known(kind: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """The names of the fields that could have been meant by the last part of a location."""
    _, field = _locate(kind, location[:-1])
    models = [kind] if field is None else list(_models(field.annotation))
    return [name for model in models for name in model.model_fields]
