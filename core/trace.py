"""Requests of the past, to be replayed: public trace formats, recognised by content.

| format | by | columns or keys |
|---|---|---|
| plain CSV | header | `arrival_s,input_tokens,output_tokens[,session,tenant]`; ServeGen's samples have `client_id` besides |
| Azure CSV | header | `TIMESTAMP,ContextTokens,GeneratedTokens` |
| Mooncake JSONL | `{` first | `timestamp` (ms), `input_length`, `output_length`, `hash_ids` (of 512 tokens each) |
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TextIO

from core.errors import ConfigError

HASH_BLOCK_TOKENS = 512
"""Tokens of one of Mooncake's `hash_ids`; equal ids mean equal tokens and an equal prefix."""
_GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """`arrival_s` counts from the trace's first request. `prefix_ids` names the prompt's blocks where the trace does."""

    arrival_s: float
    input_tokens: int
    output_tokens: int
    session: str = ""
    tenant: str = ""
    prefix_ids: tuple[int, ...] = ()


def read_trace(path: str) -> Iterator[TraceRequest]:
    """Requests in the file's order, gzipped or not; arrivals never decrease and begin at 0.

    Raises ConfigError that names the line when the file is missing, of no known format or damaged.
    """
    try:
        with _open(path) as lines:
            first = lines.readline()
            parse = _mooncake(first) if first.lstrip().startswith("{") else _csv(path, first)
            yield from _ordered(path, parse(lines))
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise ConfigError(f"cannot read the trace {path}: {error}") from None


def _open(path: str) -> TextIO:
    with Path(path).open("rb") as probe:
        zipped = probe.read(2) == _GZIP_MAGIC
    return gzip.open(path, "rt", encoding="utf-8") if zipped else Path(path).open(encoding="utf-8")


Parse = Callable[[TextIO], Iterator[TraceRequest]]


def _ordered(path: str, requests: Iterator[TraceRequest]) -> Iterator[TraceRequest]:
    """Shifts arrivals to begin at 0 and checks what every format must keep."""
    line, start, last = 1, None, 0.0
    while True:
        line += 1
        try:
            request = next(requests, None)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}, about line {line}: {type(error).__name__} {error}") from None
        if request is None:
            return
        start = request.arrival_s if start is None else start
        arrival_s = request.arrival_s - start
        if arrival_s < last:
            raise ConfigError(f"{path}, about line {line}: arrivals must not go back in time; sort the file")
        if request.input_tokens < 1 or request.output_tokens < 0:
            raise ConfigError(f"{path}, about line {line}: a request needs at least one input token and no negative output")
        last = arrival_s
        yield TraceRequest(
            arrival_s, request.input_tokens, request.output_tokens, request.session, request.tenant, request.prefix_ids
        )


def _mooncake(first: str) -> Parse:
    def parse(rest: TextIO) -> Iterator[TraceRequest]:
        for text in (first, *rest):
            if text.strip():
                row = json.loads(text)
                ids = tuple(int(value) for value in row.get("hash_ids", ()))
                yield TraceRequest(row["timestamp"] / 1000, row["input_length"], row["output_length"], prefix_ids=ids)

    return parse


def _csv(path: str, header: str) -> Parse:
    columns = next(csv.reader([header]), [])
    for names, convert in _CSV_FORMATS:
        if names <= set(columns):

            def parse(rest: TextIO, convert: Callable[[Mapping[str, str]], TraceRequest] = convert) -> Iterator[TraceRequest]:
                return map(convert, csv.DictReader(rest, fieldnames=columns))

            return parse
    raise ConfigError(
        f"{path} is no trace known here: its first line is {header.strip()[:80]!r}; "
        "a plain one has the columns arrival_s,input_tokens,output_tokens"
    )


def _plain(row: Mapping[str, str]) -> TraceRequest:
    tenant = row.get("tenant") or row.get("client_id") or ""
    session = row.get("session") or ""
    return TraceRequest(float(row["arrival_s"]), int(row["input_tokens"]), int(row["output_tokens"]), session, tenant)


def _azure(row: Mapping[str, str]) -> TraceRequest:
    stamp = row["TIMESTAMP"].replace("Z", "")
    whole, _, fraction = stamp.partition(".")  # seven digits of a second: more than datetime reads
    arrival_s = datetime.fromisoformat(whole + "+00:00").timestamp() + float(f"0.{fraction or 0}")
    return TraceRequest(arrival_s, int(row["ContextTokens"]), int(row["GeneratedTokens"]))


_CSV_FORMATS: tuple[tuple[set[str], Callable[[Mapping[str, str]], TraceRequest]], ...] = (
    ({"arrival_s", "input_tokens", "output_tokens"}, _plain),
    ({"TIMESTAMP", "ContextTokens", "GeneratedTokens"}, _azure),
)
