"""Spans of requests for an OpenTelemetry collector, with the router's decision as their attributes. Deciding code.

A span is one request as its client saw it. It continues the trace of a W3C `traceparent` (https://www.w3.org/TR/trace-context/),
else it begins one. The form is OTLP's JSON encoding: ids in hexadecimal, 64-bit numbers as strings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

HEADER = "traceparent"
_PARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})")
_SERVER, _ERROR = 2, 2
_SAMPLED = 1


class Parent(NamedTuple):
    trace_id: str
    span_id: str
    sampled: bool


@dataclass(frozen=True, slots=True)
class Ended:
    """A request that is over. `why`: what the explaining header says of it (`router.explain.header_of`), None: nothing.
    Times in nanoseconds since 1970; `span_id` 16 and `trace_id` 32 hexadecimal digits."""

    request_id: str
    why: str | None
    parent: Parent | None
    trace_id: str
    span_id: str
    began_ns: int
    ended_ns: int


def parent_of(traceparent: str) -> Parent | None:
    """None where it is none, or not valid: then a new trace begins."""
    found = _PARENT.fullmatch(traceparent.strip().lower())
    return Parent(found[1], found[2], bool(int(found[3], 16) & _SAMPLED)) if found else None


def export_of(ended: Sequence[Ended], router_id: str) -> dict[str, Any]:
    """An ExportTraceServiceRequest."""
    resource = {"attributes": _attributes({"service.name": "tandem-router", "service.instance.id": router_id})}
    return {
        "resourceSpans": [
            {"resource": resource, "scopeSpans": [{"scope": {"name": "tandem"}, "spans": list(map(_span, ended))}]}
        ]
    }


def _span(one: Ended) -> dict[str, Any]:
    known: Mapping[str, Any] = json.loads(one.why) if one.why is not None else {}
    outcome = known.get("outcome", {})
    message = outcome.get("message", "")
    return {
        "traceId": one.parent.trace_id if one.parent is not None else one.trace_id,
        "spanId": one.span_id,
        **({"parentSpanId": one.parent.span_id} if one.parent is not None else {}),
        "name": "tandem.generate",
        "kind": _SERVER,
        "startTimeUnixNano": str(one.began_ns),
        "endTimeUnixNano": str(one.ended_ns),
        "attributes": _attributes(_said(one, known)),
        "status": {"code": _ERROR, "message": message} if message else {},
    }


def _said(one: Ended, known: Mapping[str, Any]) -> dict[str, Any]:
    """Where it went, why, what was predicted and what came of it; all of it, as `tandem explain` has it, in one attribute."""
    outcome = known.get("outcome", {})
    timing = outcome.get("timing", {})
    last = (known.get("decisions") or [{}])[-1]
    best = (last.get("candidates") or [{}])[0] if last.get("placement") else {}
    place = outcome.get("placement") or last.get("placement") or {}
    values = {
        "request_id": one.request_id,
        "policy": known.get("policy"),
        "slo_class": known.get("slo_class"),
        "placement.prefill": place.get("prefill"),
        "placement.decode": place.get("decode"),
        "reason": last.get("reason"),
        "finish": outcome.get("finish"),
        "failovers": outcome.get("failovers", 0),
        "ttft_s.predicted": best.get("ttft_s"),
        "ttft_s": timing.get("ttft_s"),
        "tpot_s.predicted": best.get("tpot_s"),
        "tpot_s": timing.get("tpot_s"),
        "explain": one.why,
    }
    return {f"tandem.{name}": value for name, value in values.items() if value not in (None, "")}


def _attributes(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"key": name, "value": _value(value)} for name, value in values.items()]


def _value(value: Any) -> dict[str, Any]:
    if isinstance(value, int):
        return {"intValue": str(value)}
    return {"doubleValue": value} if isinstance(value, float) else {"stringValue": str(value)}
