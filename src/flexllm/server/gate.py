"""What every request passes first: the key, the drain, the size of its body. Plain ASGI, so that streams pass untouched."""

from __future__ import annotations

import hmac

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flexllm.server.context import Context
from flexllm.server.errors import ApiError, http_error

OPEN_PATHS = frozenset({"/", "/health", "/version", "/metrics"})
MAX_JSON_BYTES = 32 << 20
DRAINING_RETRY_SECONDS = 30


class Gate:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        context: Context = request.app.state.context
        limit = context.settings.max_upload_bytes + MAX_JSON_BYTES if request.url.path == "/v1/files" else MAX_JSON_BYTES
        try:
            if request.url.path not in OPEN_PATHS:
                _check_key(request, context)
                _check_drain(request, context)
            _check_size(int(request.headers.get("content-length") or 0), limit)
        except ApiError as error:
            await http_error(request, error)(scope, receive, send)
            return
        await self._app(scope, _limited(receive, limit), send)


def _check_key(request: Request, context: Context) -> None:
    key = context.settings.api_key
    if key is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), key.encode()):
        message = "the API key is wrong" if given else "an API key is needed: Authorization: Bearer KEY"
        raise ApiError(401, message, code="invalid_api_key")


def _check_drain(request: Request, context: Context) -> None:
    if context.draining and request.method != "GET":
        raise ApiError(503, "the server is shutting down", code="draining", retry_after=DRAINING_RETRY_SECONDS)


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        raise ApiError(413, f"the body is larger than {limit} bytes", code="body_too_large")


def _limited(receive: Receive, limit: int) -> Receive:
    """`receive` for bodies that do not say how long they are."""
    received = 0

    async def counted() -> Message:
        nonlocal received
        message = await receive()
        if message["type"] == "http.request":
            received += len(message.get("body", b""))
            _check_size(received, limit)
        return message

    return counted
