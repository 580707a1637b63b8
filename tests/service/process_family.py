"""What a process and its descendants hold: pids, shared memory, listening sockets. Read from /proc."""

from __future__ import annotations

import os
from pathlib import Path

LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
"""127.0.0.1, ::ffff:127.0.0.1 and ::1, as the kernel spells them."""


def family(pid: int) -> set[int]:
    """A process and all its descendants."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def alive(pids: set[int]) -> set[int]:
    """Those that still run; zombies do not."""
    running = set()
    for pid in pids:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            continue
        if stat.rpartition(")")[2].split()[0] != "Z":
            running.add(pid)
    return running


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


def shared_by(pids: set[int]) -> set[str]:
    """Files under /dev/shm that these processes have mapped."""
    names = set()
    for pid in pids:
        maps = Path(f"/proc/{pid}/maps").read_text()
        names |= {line.rpartition("/dev/shm/")[2] for line in maps.splitlines() if "/dev/shm/" in line}
    return names


def listening(pids: set[int]) -> set[str]:
    """Addresses, in hexadecimal, on which these processes accept TCP connections."""
    sockets = {target for pid in pids for target in _links(pid)}
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                found.add(fields[1].partition(":")[0])
    return found


def _links(pid: int) -> list[str]:
    targets = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        try:
            targets.append(os.readlink(path))
        except OSError:
            continue
    return targets
