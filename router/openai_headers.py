"""Headers of ours that say what a call may say in its body: for clients and gateways that cannot add fields to bodies.

`x-tandem-tenant`, `x-tandem-slo-class`, `x-tandem-ttft-slo-s`, `x-tandem-tbt-slo-s`, `x-tandem-tpot-slo-s`,
`x-tandem-deadline-s`, `x-tandem-priority`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TypeVar

from core.errors import InvalidRequestError
from router import spans
from router.frontend_types import FrontRequest
from router.openai_fields import FieldError, short
from router.openai_types import ApiCall

PREFIX = "x-tandem-"
_TEXTS = ("tenant", "slo_class")
_LIMITS = {"ttft_slo_s": "ttft_s", "tbt_slo_s": "tbt_s", "tpot_slo_s": "tpot_s"}
_T = TypeVar("_T")
_KNOWN = (*_TEXTS, *_LIMITS, "deadline_s", "priority")


def with_headers(call: ApiCall, headers: Iterable[tuple[bytes, bytes]]) -> ApiCall:
    """The call with what its headers add. Raises FieldError for a value that is none, and where header and body differ."""
    said: dict[str, str] = {}
    for key, value in headers:
        field = key.decode("latin-1").lower().removeprefix(PREFIX).replace("-", "_")
        if key.lower().startswith(PREFIX.encode()) and field in _KNOWN:
            said[field] = value.decode("latin-1").strip()
    if not said:
        return call
    return replace(call, requests=tuple(_with(request, said) for request in call.requests))


def with_trace(call: ApiCall, headers: Iterable[tuple[bytes, bytes]]) -> ApiCall:
    """The call as a part of its caller's trace."""
    trace = next((value.decode("latin-1") for key, value in headers if key.lower() == spans.HEADER.encode()), "")
    return replace(call, requests=tuple(replace(one, traceparent=trace) for one in call.requests)) if trace else call


def _with(request: FrontRequest, said: dict[str, str]) -> FrontRequest:
    for field, text in said.items():
        if field in _TEXTS:
            request = replace(request, **{field: _one(field, getattr(request, field), text)})
        elif field == "priority":
            request = replace(request, priority=_one(field, request.priority, _int(text)))
        elif field == "deadline_s":
            request = replace(request, deadline_s=_one(field, request.deadline_s, _float(field, text)))
        else:
            name = _LIMITS[field]
            limit_s = _one(field, getattr(request.slo, name), _float(field, text))
            request = replace(request, slo=replace(request.slo, **{name: limit_s}))
    return request


def _one(field: str, body: _T, header: _T) -> _T:
    if body and body != header:
        text = f"{field} is {short(body)} in the body and {short(header)} in {_header(field)}; send one of them"
        raise FieldError(field, text)
    return header


def _int(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise _not("priority", "a whole number", text) from None
    if not -(2**31) <= value < 2**31:
        raise _not("priority", "a number of 32 bits", text)
    return value


def _float(field: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise _not(field, "a number of seconds", text) from None


def _not(field: str, what: str, text: str) -> InvalidRequestError:
    return FieldError(field, f"{_header(field)} must be {what}, got {short(text)}")


def _header(field: str) -> str:
    return PREFIX + field.replace("_", "-")
