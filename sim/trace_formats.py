"""Formats of public traces: which columns hold what, and how a row of each is read.

| format | known by | columns or keys |
|---|---|---|
| plain | header | `arrival_s,input_tokens,output_tokens`, and of `session,tenant,slo_class` those it has |
| ServeGen | header | the plain ones and `client_id`, which is the tenant; `reason_tokens` are part of the output |
| Azure | header | `TIMESTAMP,ContextTokens,GeneratedTokens`; the wall clock, with seven digits of a second |
| Vidur, Splitwise | header | `arrived_at,num_prefill_tokens,num_decode_tokens`; `arrival_timestamp,prompt_size,token_size` |
| Mooncake | `{` first | `timestamp` (ms), `input_length`, `output_length`, `hash_ids`, one for each 512 tokens of the input |
| lengths | header | the lengths of one of these, and no time: ShareGPT, arXiv |
| inputs | header | `arrival_s,input_tokens` and no output: SpotServe |

A row that cannot be right is refused with its place: skipping it would make another workload than the file says.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from json import JSONDecodeError
from typing import Any

from core.errors import ConfigError

HASH_BLOCK_TOKENS = 512
"""Tokens of one of Mooncake's `hash_ids`; equal ids mean equal tokens and an equal prefix."""
TOKENS_MAX = 2**31 - 1
SHOWN_MAX = 60
FIELDS = ("arrival_s", "input_tokens", "output_tokens", "session", "tenant", "slo_class")

Raw = tuple[int, float, int, int, tuple[int, ...], str, str, str]
"""Line of the file from 1, time in s, input and output tokens, hash ids, session, tenant, class; nothing is checked yet."""


@dataclass(frozen=True, slots=True)
class Format:
    """`columns`: the file's names of FIELDS, "" where it has none. `parse` reads the rows behind the first line, which it is
    given too, and raises RowError. `blocks`: the file may have hash ids."""

    name: str
    columns: tuple[str, ...]
    parse: Callable[[str, Iterable[str]], Iterator[Raw]]
    blocks: bool = False

    @property
    def untimed(self) -> bool:
        """The file has lengths and no times; they read as NaN."""
        return not self.columns[0]

    @property
    def outputless(self) -> bool:
        """The file does not say how long answers are; they read as 0."""
        return not self.columns[2]


class RowError(Exception):
    """What is wrong with a line (counted from 1) of the file; `column` is "" when it is all of it."""

    def __init__(self, line: int, column: str, why: str) -> None:
        super().__init__(line, column, why)
        self.line, self.column, self.why = line, column, why


def recognise(path: str, first: str) -> Format:
    """The format of the file that begins with this line. Raises ConfigError when it is none of those known."""
    if first.lstrip().startswith("{"):
        return Format("Mooncake", _MOONCAKE, _mooncake, blocks=True)
    header = [name.strip() for name in next(csv.reader([first]), [])]
    for name, columns, read_time in _CSV:
        if set(columns[:3]) <= {"", *header}:
            found = tuple(column if column in header else "" for column in columns)
            if name == "plain" and "client_id" in header and not found[4]:
                name, found = "ServeGen", (*found[:4], "client_id", *found[5:])
            return Format(name, found, _CsvRows(header, found, read_time).parse)
    raise ConfigError(f"{path} is no trace known here: {_what_is_missing(header, first)}")


def _what_is_missing(header: list[str], first: str) -> str:
    plain = FIELDS[:3]
    if not first.strip():
        return f"its first line is empty; a plain one is {','.join(plain)}"
    missing = [name for name in plain if name not in header]
    if header and len(missing) < len(plain):
        return f"its first line has no column {' and no column '.join(missing)}"
    return f"its first line is {shown(first.strip())}; a plain one is {','.join(plain)}"


def shown(value: object) -> str:
    """A value of the file, for an error: not more of it than fits a line."""
    text = repr(value)
    return text if len(text) <= SHOWN_MAX else f"{text[:SHOWN_MAX]}…"


def _seconds(text: str) -> float:
    return float(text)


class _Stamps:
    """Wall clock to seconds since the first stamp's whole second, so that a hundred nanoseconds survive in a float."""

    def __init__(self) -> None:
        self._start: datetime | None = None

    def __call__(self, text: str) -> float:
        whole, _, rest = text.strip().partition(".")
        digits = len(rest) - len(rest.lstrip("0123456789"))
        at = datetime.fromisoformat(whole + rest[digits:])  # of a fraction it would read six digits
        if at.tzinfo is None:
            at = at.replace(tzinfo=UTC)
        if self._start is None:
            self._start = at
        return (at - self._start).total_seconds() + (int(rest[:digits]) / 10**digits if digits else 0.0)


@dataclass(frozen=True, slots=True)
class _CsvRows:
    header: list[str]
    columns: tuple[str, ...]
    read_time: Callable[[], Callable[[str], float]]

    def parse(self, _: str, rest: Iterable[str]) -> Iterator[Raw]:
        header, width, to_seconds = self.header, len(self.header), self.read_time()
        at, asked, told, *names = (header.index(name) if name else -1 for name in self.columns)
        session, tenant, slo_class = names
        reader = csv.reader(rest)
        while True:
            try:
                for row in reader:
                    if len(row) != width:
                        if not row:
                            continue
                        raise self._width_error(reader.line_num + 1, row)
                    yield (
                        reader.line_num + 1,
                        to_seconds(row[at]) if at >= 0 else float("nan"),
                        int(row[asked]),
                        int(row[told]) if told >= 0 else 0,
                        (),
                        row[session] if session >= 0 else "",
                        row[tenant] if tenant >= 0 else "",
                        row[slo_class] if slo_class >= 0 else "",
                    )
                return
            except ValueError:
                raise self._value_error(reader.line_num + 1, row, to_seconds) from None
            except csv.Error as error:
                raise RowError(reader.line_num + 1, "", str(error)) from None

    def _width_error(self, line: int, row: list[str]) -> RowError:
        if len(row) < len(self.header):
            return RowError(
                line, self.header[len(row)], f"the row has {len(row)} values, the first line names {len(self.header)}"
            )
        return RowError(line, "", f"the row has {len(row)} values, the first line names {len(self.header)}")

    def _value_error(self, line: int, row: list[str], to_seconds: Callable[[str], float]) -> RowError:
        readers: tuple[tuple[Callable[[str], float], str], ...] = (
            (to_seconds, "no time"),
            (int, "no whole number of tokens"),
            (int, "no whole number of tokens"),
        )
        for column, (read, why) in zip(self.columns[:3], readers, strict=True):
            value = row[self.header.index(column)] if column else "0"
            try:
                read(value)
            except ValueError:
                return RowError(line, column, f"{shown(value)} is {why}")
        raise AssertionError("one of them could not be read")


_PLAIN = ("arrival_s", "input_tokens", "output_tokens", "session", "tenant", "slo_class")
_CSV: tuple[tuple[str, tuple[str, ...], Callable[[], Callable[[str], float]]], ...] = (
    ("plain", _PLAIN, lambda: _seconds),
    ("Azure", ("TIMESTAMP", "ContextTokens", "GeneratedTokens", "", "", ""), _Stamps),
    ("Vidur", ("arrived_at", "num_prefill_tokens", "num_decode_tokens", "", "", ""), lambda: _seconds),
    ("Splitwise", ("arrival_timestamp", "prompt_size", "token_size", "", "", ""), lambda: _seconds),
    ("lengths", ("", *_PLAIN[1:]), lambda: _seconds),
    ("lengths", ("", "num_prefill_tokens", "num_decode_tokens", "", "", ""), lambda: _seconds),
    ("inputs", (*_PLAIN[:2], "", *_PLAIN[3:]), lambda: _seconds),
)
"""Name, columns, and what makes the reader of one file's times. The first whose columns a header has is taken."""


_MOONCAKE = ("timestamp", "input_length", "output_length", "", "", "")


def _mooncake(first: str, rest: Iterable[str]) -> Iterator[Raw]:
    for line, text in enumerate(_with_first(first, rest), 1):
        if text.isspace():
            continue
        try:
            row = json.loads(text)
        except JSONDecodeError as error:
            raise RowError(line, "", f"no JSON at character {error.pos + 1}: {error.msg}") from None
        except RecursionError:
            raise RowError(line, "", "no JSON: nested too deep") from None
        if type(row) is not dict:
            raise RowError(line, "", f"{shown(row)} is no JSON object")
        values: list[Any] = [row.get(name) for name in (*_MOONCAKE[:3], "hash_ids")]
        at_ms, asked, told, ids = values
        if not (type(at_ms) in (int, float) and type(asked) is type(told) is int):
            raise _json_error(line, row)
        yield line, at_ms / 1000, asked, told, _hash_ids(line, ids, asked), "", "", ""


def _with_first(first: str, rest: Iterable[str]) -> Iterator[str]:
    yield first
    yield from rest


def _hash_ids(line: int, ids: Any, asked: int) -> tuple[int, ...]:
    if ids is None:
        return ()
    if type(ids) is not list or not set(map(type, ids)) <= {int}:
        raise RowError(line, "hash_ids", f"{shown(ids)} is no list of whole numbers")
    if ids and len(ids) != -(-asked // HASH_BLOCK_TOKENS):
        why = f"{len(ids)} ids of {HASH_BLOCK_TOKENS} tokens each cannot name an input_length of {asked}"
        raise RowError(line, "hash_ids", why)
    return tuple(ids)


def _json_error(line: int, row: Mapping[str, Any]) -> RowError:
    kinds: tuple[type, ...] = (int, float)
    why = "no time in ms"
    for name in _MOONCAKE[:3]:
        if name not in row:
            return RowError(line, name, "it is missing")
        if type(row[name]) not in kinds:
            return RowError(line, name, f"{shown(row[name])} is {why}")
        kinds, why = (int,), "no whole number of tokens"
    raise AssertionError("one of them is wrong")
