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

A trace of spot instances (`sim.spot_traces`) takes workers away after a notice, and their places stay empty until another
instance comes. Where pools say which workers are on the spot market, only those are taken (`sim.cluster.spot_names`).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from core.errors import ConfigError
from sim.spot_traces import dealt, is_spot_trace, read_spot_trace

TARGETED = ("kill", "notice", "partition", "slow", "add")
KINDS = (*TARGETED, "lose_reports", "lose_directory")
LASTING_S = 10.0


@dataclass(frozen=True, slots=True)
class Fault:
    """`share` is that of a slow link's speed, or of reports lost. `refill` False: the place stays empty until an `add`."""

    at_s: float
    kind: str
    target: str = ""
    for_s: float | None = None
    share: float = 0.1
    refill: bool = True


def read_faults(path: str, workers: Sequence[str], stores: Sequence[str] = (), spot: Sequence[str] = ()) -> list[Fault]:
    """In order of time. `workers`, `stores`: the names there are; spot traces take workers alone, those of `spot` where that
    names any. Raises ConfigError that names the entry for what cannot be used."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the faults {path}: {error}") from None
    if is_spot_trace(text.partition("\n")[0]):
        return _spot(path, text, spot or workers)
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


def as_recorded(faults: Iterable[Fault], notice_s: float) -> list[Fault]:
    """Spot traces say when an instance is gone: the notice comes `notice_s` before, as far as there is time since the start."""
    told = [
        replace(fault, at_s=fault.at_s - min(notice_s, fault.at_s), for_s=min(notice_s, fault.at_s))
        if fault.kind == "notice" and not fault.refill
        else fault
        for fault in faults
    ]
    return sorted(told, key=lambda fault: fault.at_s)


def _spot(path: str, text: str, workers: Sequence[str]) -> list[Fault]:
    found = dealt(read_spot_trace(path, text), workers)
    return [
        Fault(one.at_s, "add", one.worker) if one.comes else Fault(one.at_s, "notice", one.worker, refill=False)
        for one in found
    ]


def drawn_faults(draw: random.Random, nodes: Sequence[str], duration_s: float, most: int, directory: bool) -> list[Fault]:
    """Up to so many, of every kind but those of spot traces; with a `directory` that can be lost."""
    faults = []
    for _ in range(draw.randint(0, most)):
        kind = draw.choice(("kill", "kill", "notice", "partition", "slow", "lose_reports", *["lose_directory"] * directory))
        lasts_s = draw.choice((0.2, 2.0, 8.0, 20.0)) * draw.uniform(0.5, 1.5)
        target = draw.choice(nodes) if kind in TARGETED else ""
        faults.append(Fault(draw.uniform(0, duration_s), kind, target, lasts_s, draw.choice((0.02, 0.3, 0.9))))
    return sorted(faults, key=lambda fault: fault.at_s)
