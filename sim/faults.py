"""What goes wrong in a simulation, and when: from a file, from a trace of spot instances, or drawn.

A file is a YAML or JSON list of mappings with `at_s` (counted from the first arrival) and `kind`:

| kind | target | further keys |
|---|---|---|
| kill | a worker, a store | its process dies, with what it has in memory |
| notice | a worker, a store | `for_s`: it is drained, and dies so long after (default: sim.notice_s) |
| partition | a worker, a store | `for_s`: nobody reaches it, its process lives on |
| slow | a worker, a store | `for_s`, `share`: its links pass this share of what they did |
| lose_directory | | `for_s`: the directory (or its Redis) answers nobody, and comes back empty; with sim.directory alone |
| lose_reports | | `for_s`, `share`: part of all reports to the controller that is lost |
| add | a worker | of spot traces: the place of one that was taken away may be filled again |

A trace of spot instances is a CSV of `time_ms,event,node`: `remove` takes a worker away after a notice, and its place stays
empty until an `add`.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from core.errors import ConfigError

TARGETED = ("kill", "notice", "partition", "slow", "add")
KINDS = (*TARGETED, "lose_reports", "lose_directory")
LASTING_S = 10.0
SPOT_COLUMNS = {"time_ms", "event", "node"}


@dataclass(frozen=True, slots=True)
class Fault:
    """`share` is that of a slow link's speed, or of reports lost. `refill` False: the place stays empty until an `add`."""

    at_s: float
    kind: str
    target: str = ""
    for_s: float | None = None
    share: float = 0.1
    refill: bool = True


def read_faults(path: str, workers: Sequence[str], stores: Sequence[str] = ()) -> list[Fault]:
    """In order of time. `workers`, `stores`: the names there are; spot traces take workers alone. Raises ConfigError that names
    the entry for what cannot be used."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the faults {path}: {error}") from None
    header = text.partition("\n")[0]
    if {column.strip() for column in header.split(",")} >= SPOT_COLUMNS:
        return _spot(path, text, workers)
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} holds no faults: {error}") from None
    if not isinstance(tree, list):
        raise ConfigError(f"{path} must hold a list of faults, each with at_s and kind")
    return sorted(
        (_fault(path, number, each, [*workers, *stores]) for number, each in enumerate(tree)), key=lambda fault: fault.at_s
    )


def _fault(path: str, number: int, tree: Any, workers: Sequence[str]) -> Fault:
    where = f"{path}, fault {number + 1}"
    if not isinstance(tree, dict) or not {"at_s", "kind"} <= tree.keys():
        raise ConfigError(f"{where}: needs at_s and kind")
    try:
        fault = Fault(**tree)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from None
    numbers = {"at_s": fault.at_s, "share": fault.share, "for_s": 1.0 if fault.for_s is None else fault.for_s}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
            raise ConfigError(f"{where}: {name} must be a number of at least 0, got {value!r}")
    if fault.kind not in KINDS:
        raise ConfigError(f"{where}: kind {fault.kind!r} is not known; choose one of {', '.join(KINDS)}")
    if fault.kind in TARGETED and fault.target not in workers:
        known = ", ".join(workers[:8]) + (" ..." if len(workers) > 8 else "")
        raise ConfigError(f"{where}: target {fault.target!r} is no worker or store of this cluster; there are {known}")
    if fault.kind == "slow" and fault.share <= 0:
        raise ConfigError(f"{where}: share must be above 0; a link that passes nothing is a partition")
    if fault.kind == "lose_reports" and fault.share > 1:
        raise ConfigError(f"{where}: share must be at most 1")
    return fault


def _spot(path: str, text: str, workers: Sequence[str]) -> list[Fault]:
    """Instances are dealt to workers as they come; what the trace has beyond our number is nobody's."""
    faults: list[Fault] = []
    of: dict[str, str] = {}
    empty: list[str] = []
    free = list(reversed(workers))
    for line, row in enumerate(csv.DictReader(text.splitlines()), 2):
        try:
            at_s, event, node = float(row["time_ms"]) / 1e3, row["event"].strip(), (row["node"] or "").strip()
        except (TypeError, ValueError, KeyError) as error:
            raise ConfigError(f"{path}, line {line}: time_ms, event and node are needed ({error})") from None
        if event == "add" and node not in of and empty:
            of[node] = empty.pop(0)
            faults.append(Fault(at_s, "add", of[node]))
        elif event == "add" and node not in of and free:
            of[node] = free.pop()
        elif event == "remove" and node in of:
            taken = of.pop(node)
            empty.append(taken)
            faults.append(Fault(at_s, "notice", taken, refill=False))
    return faults


def drawn_faults(draw: random.Random, nodes: Sequence[str], duration_s: float, most: int, directory: bool) -> list[Fault]:
    """Up to so many, of every kind but those of spot traces; with a `directory` that can be lost."""
    faults = []
    for _ in range(draw.randint(0, most)):
        kind = draw.choice(("kill", "kill", "notice", "partition", "slow", "lose_reports", *["lose_directory"] * directory))
        lasts_s = draw.choice((0.2, 2.0, 8.0, 20.0)) * draw.uniform(0.5, 1.5)
        target = draw.choice(nodes) if kind in TARGETED else ""
        faults.append(Fault(draw.uniform(0, duration_s), kind, target, lasts_s, draw.choice((0.02, 0.3, 0.9))))
    return sorted(faults, key=lambda fault: fault.at_s)
