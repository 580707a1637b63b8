"""Traces of spot instances that came and went, as faults of a cluster: who is taken away when, and whose place is filled again.

| file | columns |
|---|---|
| events | `time_ms,event,node`: `add` and `remove` of an instance; `DONE` ends the trace, `other` is about something else |
| counts | `t_s,live_instances`: how many were alive when polled; of a drop, those that were there longest are taken |

Instances are dealt to workers as they come; what a trace has beyond the workers is nobody's.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from core.errors import ConfigError
from sim.trace_formats import shown

EVENT_COLUMNS = ("time_ms", "event", "node")
COUNT_COLUMNS = ("t_s", "live_instances")
_EVENTS = ("add", "remove", "DONE", "other")
_COUNT_MAX = 1_000_000


@dataclass(frozen=True, slots=True)
class Change:
    """`comes`: an instance is up; else it is gone."""

    at_s: float
    comes: bool
    node: str


@dataclass(frozen=True, slots=True)
class Taken:
    """At `at_s` a worker's place is emptied (`comes` False) or may be filled again."""

    at_s: float
    comes: bool
    worker: str


def is_spot_trace(first: str) -> bool:
    """By its first line."""
    header = _header(first)
    return header >= set(EVENT_COLUMNS) or header >= set(COUNT_COLUMNS)


def read_spot_trace(path: str, text: str) -> list[Change]:
    """Raises ConfigError that names row and column of what cannot be right."""
    lines = text.splitlines()
    rows = csv.DictReader(lines, skipinitialspace=True)
    rows.fieldnames = [name.strip() for name in rows.fieldnames or ()]
    if _header(lines[0]) >= set(EVENT_COLUMNS):
        return list(_events(path, rows))
    return list(_counted(_counts(path, rows)))


def dealt(changes: Iterable[Change], workers: Sequence[str]) -> Iterator[Taken]:
    """What becomes of the workers: the first instances are theirs, in order; later ones fill the places left longest."""
    of: dict[str, str] = {}
    empty: list[str] = []
    free = list(reversed(workers))
    for change in changes:
        if not change.comes:
            if change.node in of:
                empty.append(of.pop(change.node))
                yield Taken(change.at_s, False, empty[-1])
        elif change.node in of:
            continue
        elif empty:
            of[change.node] = empty.pop(0)
            yield Taken(change.at_s, True, of[change.node])
        elif free:
            of[change.node] = free.pop()


def _header(line: str) -> set[str]:
    return {column.strip() for column in line.removeprefix("\ufeff").split(",")}


def _events(path: str, rows: csv.DictReader[str]) -> Iterator[Change]:
    last_s = 0.0
    for row in rows:
        where = f"{path}, row {rows.line_num - 1} (line {rows.line_num})"
        last_s = _time_s(where, "time_ms", row, last_s, 1e-3)
        event, node = (str(row.get(name) or "").strip() for name in EVENT_COLUMNS[1:])
        if event == "DONE":
            return
        if event not in _EVENTS:
            raise ConfigError(f"{where}, column event: {shown(event)} is none of {', '.join(_EVENTS)}")
        if event != "other":
            if not node:
                raise ConfigError(f"{where}, column node: which instance is it?")
            yield Change(last_s, event == "add", node)


def _counts(path: str, rows: csv.DictReader[str]) -> Iterator[tuple[float, int]]:
    last_s = 0.0
    for row in rows:
        where = f"{path}, row {rows.line_num - 1} (line {rows.line_num})"
        last_s = _time_s(where, "t_s", row, last_s, 1.0)
        text = str(row.get("live_instances") or "").strip()
        if not text.isdecimal() or int(text) > _COUNT_MAX:
            raise ConfigError(f"{where}, column live_instances: {shown(text)} is no number of instances")
        yield last_s, int(text)


def _counted(counts: Iterable[tuple[float, int]]) -> Iterator[Change]:
    alive: list[str] = []
    begun = 0
    for at_s, count in counts:
        while len(alive) > count:
            yield Change(at_s, False, alive.pop(0))
        while len(alive) < count:
            alive.append(f"instance-{begun}")
            begun += 1
            yield Change(at_s, True, alive[-1])


def _time_s(where: str, column: str, row: dict[str, str], last_s: float, unit_s: float) -> float:
    text = row.get(column)
    try:
        at_s = float(text or "") * unit_s
    except ValueError:
        at_s = math.nan
    if not math.isfinite(at_s) or at_s < 0:
        raise ConfigError(f"{where}, column {column}: {shown(text)} is no time of 0 or more")
    if at_s < last_s:
        raise ConfigError(f"{where}, column {column}: {at_s:.10g} s comes after {last_s:.10g} s; sort the file")
    return at_s
