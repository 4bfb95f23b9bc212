"""Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import json
import logging
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

logger = logging.getLogger("flexllm.server")

STORAGE_RETRY_SECONDS = 60
ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class ApiError(HTTPException):
    """What a handler raises to answer with `status`. `param` names the offending field, in dotted form."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int | None = None
    ) -> None:
        headers = {"retry-after": str(retry_after)} if retry_after is not None else None
        super().__init__(status, message, headers)
        self.param, self.code = param, code

    def body(self) -> dict[str, Any]:
        return error_body(self.status_code, self.detail, self.param, self.code)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def not_found(kind: str, name: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(404, f"{kind} {name!r} does not exist", param=param, code=code or f"{kind.split()[-1]}_not_found")


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class ErrorResponse(Response):
    """ASCII JSON: a message may quote input that is not encodable text."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode("ascii")


def http_error(_: Request, error: Exception) -> Response:
    """Handler of ApiError and of the framework's own HTTP errors (unknown route, wrong method, broken multipart body)."""
    assert isinstance(error, HTTPException)
    if isinstance(error, ApiError):
        body = error.body()
    else:
        body = error_body(error.status_code, str(error.detail))
    return ErrorResponse(body, status_code=error.status_code, headers=dict(error.headers or {}))


def validation_error(_: Request, error: Exception) -> Response:
    """The first thing wrong with the input, as a 400 that names the field."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return ErrorResponse(error_body(400, f"the body is not valid JSON: {first['ctx']['error']}"), status_code=400)
    param = _field_path(first, error.body)
    if first["type"] == "extra_forbidden":
        message = f"{param} is not supported"
    elif first["type"] == "missing":
        message = f"{param or 'the body'} is required"
    else:
        message = f"{param}: {first['msg']}" if param else first["msg"]
    return ErrorResponse(error_body(400, message, param or None), status_code=400)


def storage_error(_: Request, error: Exception) -> Response:
    """A full disk, for one: what was being stored is not, and serving goes on."""
    logger.error("storage failed: %s", error)
    body = error_body(503, f"the server cannot store this now ({error})", code="storage_error")
    return ErrorResponse(body, status_code=503, headers={"retry-after": str(STORAGE_RETRY_SECONDS)})


def internal_error(_: Request, error: Exception) -> Response:
    return ErrorResponse(error_body(500, f"internal error ({type(error).__name__})"), status_code=500)


def _field_path(error: dict[str, Any], body: Any) -> str:
    """The dotted path of the field, without what pydantic adds for union members (they are no part of the input)."""
    source, *loc = error["loc"]
    if source != "body":
        return ".".join(str(part) for part in loc)
    path = []
    value: Any = dict(body) if hasattr(body, "multi_items") else body
    for part in loc:
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            continue
        path.append(str(part))
    if error["type"] == "missing" and loc:
        path.append(str(loc[-1]))
    return ".".join(path)
