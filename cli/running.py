"""Clusters that run on this machine: each leaves its addresses in a file, so that nobody has to type them."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from core.config import state_dir
from tandem.errors import InvalidRequestError, UnavailableError

_LOOPBACK = {"127.0.0.1", "localhost", "[::1]", "::1", "0.0.0.0", "[::]"}


@dataclass(frozen=True, slots=True)
class Running:
    """One `tandem up`. `started` is its process' start time in kernel ticks: a pid alone may have been used again."""

    pid: int
    started: int
    grpc: str
    http: str
    admin: str
    model: str


@contextlib.contextmanager
def announced(grpc: str, http: str, admin: str, model: str) -> Iterator[None]:
    """While inside, this process is found by `find`."""
    pid = os.getpid()
    path = state_dir() / f"{pid}.json"
    record = Running(pid, _started(pid) or 0, grpc, http, admin, model)
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(asdict(record)))
    fresh.rename(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def listed() -> list[Running]:
    """Clusters whose process is alive, oldest first; files of dead ones are removed."""
    found = []
    for path in state_dir().glob("*.json"):
        try:
            record = Running(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            continue  # being written or removed, or of another version
        if _started(record.pid) == record.started:
            found.append(record)
        else:
            path.unlink(missing_ok=True)
    return sorted(found, key=lambda record: record.started)


def find(grpc: str | None = None, admin: str | None = None) -> Running:
    """The only running cluster, or the one with this address.

    Raises UnavailableError when there is none, InvalidRequestError when several run and none was named.
    """
    candidates = [
        record
        for record in listed()
        if (grpc is None or _same(record.grpc, grpc)) and (admin is None or _same(record.admin, admin))
    ]
    if not candidates:
        named = f" with the address {grpc or admin}" if grpc or admin else ""
        raise UnavailableError(f"no cluster{named} was started on this machine; start one with `tandem up`")
    if len(candidates) > 1:
        choices = ", ".join(record.grpc for record in candidates)
        raise InvalidRequestError(f"{len(candidates)} clusters run on this machine; name one with --grpc: {choices}")
    return candidates[0]


def grpc_address(given: str | None) -> str:
    return given or find().grpc


def admin_address(grpc: str | None, admin: str | None) -> str:
    """Where to ask about a cluster: given, looked up, or else the gRPC address itself."""
    if admin:
        return admin
    try:
        return find(grpc=grpc).admin
    except UnavailableError:
        if grpc is None:
            raise
        return grpc


def _same(one: str, other: str) -> bool:
    (host, _, port), (other_host, _, other_port) = one.rpartition(":"), other.rpartition(":")
    return port == other_port and (host == other_host or {host, other_host} <= _LOOPBACK)


def _started(pid: int) -> int | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else int(fields[19])
