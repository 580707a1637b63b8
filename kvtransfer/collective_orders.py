"""What a worker tells the helper process that holds its groups, and what it hears: one line of JSON each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class Meet:
    """Be rank 1 of a new group. Answered with `port` of the store, before the other has come."""

    group: str
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Join:
    """Be rank 0 of the group whose other half waits at `store`. Answered when the group stands."""

    group: str
    store: str
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Span:
    """Blocks of a shared arena, cut into pieces."""

    arena: str
    epoch: int
    blocks: Sequence[int]
    pieces: Sequence[int]


@dataclass(frozen=True, slots=True)
class Send:
    """Answered with `gone`, the places in the list whose generation words are other ones after the last byte left."""

    group: str
    seq: int
    span: Span
    generations: Sequence[int]
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Receive:
    """`digests`: of each block, empty when nobody is to look. Answered with `corrupted`, the first mismatch or None."""

    group: str
    seq: int
    span: Span
    indices: Sequence[int]
    digests: Sequence[int]
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Drop:
    """End a group, in mid-transfer too. Answered when nothing of it touches the arena any more, with `abandoned`: how many

    threads still wait for a peer that does not come or has gone (they end by their own deadline)."""

    group: str


Order = Meet | Join | Send | Receive | Drop
_KINDS: dict[str, type[Order]] = {kind.__name__: kind for kind in (Meet, Join, Send, Receive, Drop)}


def to_line(number: int, order: Order) -> bytes:
    body = {field.name: getattr(order, field.name) for field in fields(order)}
    if isinstance(span := body.get("span"), Span):
        body["span"] = {field.name: getattr(span, field.name) for field in fields(span)}
    return _line({"id": number, "order": type(order).__name__, "body": body})


def from_line(line: bytes) -> tuple[int, Order]:
    message = json.loads(line)
    body = message["body"]
    if "span" in body:
        body["span"] = Span(**body["span"])
    return message["id"], _KINDS[message["order"]](**body)


def answer(number: int, result: Mapping[str, Any]) -> bytes:
    return _line({"id": number, "result": result})


def failure(number: int, message: str) -> bytes:
    return _line({"id": number, "error": message})


def event(**fields_of: Any) -> bytes:
    """Said without being asked: `ready` with the backend's name, `fatal` with a reason, `broken` with a group's name."""
    return _line(fields_of)


def _line(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"
