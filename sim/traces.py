"""Requests of the past, to be replayed: one reader for all formats of `sim.trace_formats`, plain or gzipped.

What it takes and what it refuses, always with file, row and column:

- Times never decrease, are never negative and end up beginning at 0; files are read as a stream and so never sorted here.
- A request reads and writes at least one token. Rows of none are failed or cancelled requests: whoever wants them out of the
  workload takes them out of the file.
- Where a context is given, a request longer than it is refused; `sim.workload.within_context` cuts instead.
"""

from __future__ import annotations

import gzip
import io
import math
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from core.errors import ConfigError
from sim.trace_formats import FIELDS, HASH_BLOCK_TOKENS, TOKENS_MAX, Format, Raw, RowError, recognise
from sim.workload import Arrival

_GZIP_MAGIC = b"\x1f\x8b"
_BUFFER_BYTES = 1 << 18


def trace_format(path: str) -> Format:
    """What kind of trace the file is. Raises ConfigError when it is missing or of no known format."""
    with opened(path) as lines:
        return recognise(path, lines.readline())


def read_trace(
    path: str, *, due: Iterable[float] | None = None, output_tokens: int | None = None, context_max: int | None = None
) -> Iterator[Arrival]:
    """Requests in the file's order, as a stream; arrivals never decrease and begin at 0.

    `due` gives the times, in seconds, of a file of lengths alone, and ends the trace when it ends; `output_tokens` the length
    of answers where the file has none. `context_max`: the most tokens that a request's input and output may come to.

    Raises ConfigError when the file is missing, of no known format or damaged, naming row and column.
    """
    with opened(path) as lines:
        first = lines.readline()
        format = recognise(path, first)
        if format.untimed != (due is not None):
            raise ConfigError(f"{path} has {_NO_TIMES if format.untimed else _TIMES}")
        if format.outputless != (output_tokens is not None):
            raise ConfigError(f"{path} has {_NO_OUTPUTS if format.outputless else _OUTPUTS}")
        place = _Place(path, format)
        rows = format.parse(first, lines)
        if due is not None:
            rows = ((row[0], at, *row[2:]) for row, at in zip(rows, due, strict=False))
        if output_tokens is not None:
            rows = ((*row[:3], output_tokens, *row[4:]) for row in rows)
        try:
            yield from _checked(place, rows, due is None, context_max)
        except RowError as error:
            raise place.error(error) from None


_NO_TIMES = "lengths and no times of arrival; give a rate: sim.rate_rps, or --rate of `tandem plan` and `tandem bench`"
_TIMES = "times of arrival of its own; scale its rate instead"
_NO_OUTPUTS = (
    "no column output_tokens; say how long answers are: sim.output_tokens, --output-tokens of `tandem bench` or `plan`"
)
_OUTPUTS = "lengths of answers of its own"


@contextmanager
def opened(path: str) -> Iterator[TextIO]:
    try:
        with Path(path).open("rb") as file:
            zipped = file.read(2) == _GZIP_MAGIC
            file.seek(0)
            plain = io.BufferedReader(gzip.GzipFile(fileobj=file), _BUFFER_BYTES) if zipped else file
            with io.TextIOWrapper(plain, encoding="utf-8-sig", newline="") as lines:
                yield lines
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"cannot read the trace {path}: {error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read the trace {path}: it is no text, at byte {error.object[error.start]:#04x}") from None


class _Place:
    """Says where in the file something is wrong."""

    def __init__(self, path: str, format: Format) -> None:
        self._path, self._format = path, format
        self._headings = 0 if format.blocks else 1

    def error(self, error: RowError) -> ConfigError:
        column = f", column {error.column}" if error.column else ""
        return ConfigError(f"{self._path}, row {error.line - self._headings} (line {error.line}){column}: {error.why}")

    def wrong(self, line: int, field: str, why: str) -> RowError:
        return RowError(line, self._format.columns[FIELDS.index(field)], why)


def _checked(place: _Place, rows: Iterator[Raw], from_zero: bool, context_max: int | None) -> Iterator[Arrival]:
    """Keeps what every format must keep."""
    last = start = 0.0
    longest = TOKENS_MAX if context_max is None else context_max
    first = True
    for line, at, asked, told, ids, session, tenant, slo_class in rows:
        if not last <= at < math.inf:
            raise place.wrong(line, "arrival_s", _why_no_time(at, last))
        if asked < 1 or told < 1 or asked + told > longest:
            raise _wrong_length(place, line, asked, told, context_max)
        last = at
        if first and from_zero:
            start, first = at, False
        yield Arrival(at - start, asked, told, ids, HASH_BLOCK_TOKENS if ids else 0, session, tenant, slo_class)


def _why_no_time(at: float, last: float) -> str:
    if not math.isfinite(at):
        return f"{at} is no time"
    if at < 0:
        return f"{at:.10g} s is negative; times count from the beginning of the trace"
    return f"{at:.10g} s comes after {last:.10g} s; arrivals must not go back in time: sort the file"


def _wrong_length(place: _Place, line: int, asked: int, told: int, context_max: int | None) -> RowError:
    for field, tokens in (("input_tokens", asked), ("output_tokens", told)):
        if tokens < 1:
            return place.wrong(line, field, f"{tokens} tokens; a request reads and writes at least one: take the row out")
        if tokens > TOKENS_MAX:
            return place.wrong(line, field, f"{tokens} tokens are more than any model holds")
    field = "input_tokens" if context_max is None or asked >= context_max else "output_tokens"
    return place.wrong(line, field, f"{asked} + {told} tokens are more than the context of {context_max or TOKENS_MAX:,} holds")
