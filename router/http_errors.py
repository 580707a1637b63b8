"""Our errors as OpenAI's: status, headers and body."""

from __future__ import annotations

import logging
import math
import uuid
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from core.errors import InternalError, TandemError
from router.explain import HEADER

log = logging.getLogger(__name__)

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}


def body_of(error: BaseException) -> dict[str, Any]:
    """`{"error": {…}}`. What is not an error of ours is logged, and the user learns only that it was our mistake."""
    ours = _ours(error)
    return _body(ours.http_status, ours.message, ours.code, getattr(ours, "param", None))


def response_of(error: BaseException, request_id: str, why: str | None = None) -> JSONResponse:
    """`why`: the value of the explaining header, where it is wanted and anything is known."""
    ours = _ours(error)
    headers = {"x-request-id": request_id} | ({HEADER: why} if why is not None else {})
    if ours.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(ours.retry_after_s)))
    if ours.http_status in (408, 413):
        headers["connection"] = "close"  # the rest of the body will not be read
    return JSONResponse(body_of(ours), status_code=ours.http_status, headers=headers)


async def raised(request: Request, error: Exception) -> JSONResponse:
    """Starlette's handler for errors of the small endpoints."""
    return response_of(error, uuid.uuid4().hex)


async def not_served(request: Request, error: Exception) -> JSONResponse:
    """Starlette's handler for paths and methods that are not there."""
    assert isinstance(error, HTTPException)
    method, path = request.method, request.url.path
    messages = {
        404: f"there is no {path} here; this server has /v1/completions, /v1/chat/completions and /v1/models",
        405: f"{path} does not take {method}; it takes {(error.headers or {}).get('Allow', 'another method')}",
    }
    message = messages.get(error.status_code, error.detail)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    return JSONResponse(_body(error.status_code, message, code, None), status_code=error.status_code, headers=error.headers)


def _body(status: int, message: str, code: str | None, param: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": _TYPES.get(status, "server_error"), "param": param, "code": code}}


def _ours(error: BaseException) -> TandemError:
    if isinstance(error, TandemError):
        return error
    log.error("a request failed by our own mistake", exc_info=error)
    return InternalError("the router made a mistake on this request; its log says which")
