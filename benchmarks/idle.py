"""What a default cluster costs while nobody asks it anything: one part of `benchmarks.spine`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.clusters import tandem
from benchmarks.rows import Row

GIB = 2**30
_TICKS = os.sysconf("SC_CLK_TCK")
_RAY_ALONE = """
import asyncio, sys
from cluster.ray_launcher import RayLauncher
from core.config import Config

async def main():
    started = asyncio.Event()
    launcher = RayLauncher(Config().cluster, started.set)
    await started.wait()
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await launcher.close()

asyncio.run(main())
"""


def family(root: int) -> list[int]:
    """`root` and every process below it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue  # it ended
            children.setdefault(parent, []).append(int(entry.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def pss_bytes(pids: list[int]) -> int:
    """Proportional set size: shared pages are counted once among those who share them."""
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
    return total


def rss_bytes(pids: list[int]) -> int:
    total = 0
    for pid in pids:
        try:
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            continue
    return total


def cpu_share(root: int, seconds: float) -> float:
    """Cores used by a family of processes over `seconds`."""

    def used() -> float:
        total = 0
        for pid in family(root):
            try:
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            total += int(fields[11]) + int(fields[12])
        return total / _TICKS

    before, started = used(), time.monotonic()
    subprocess.run(["sleep", str(seconds)], check=True)
    return (used() - before) / (time.monotonic() - started)


def ray_alone(seconds: float) -> float:
    process = subprocess.Popen([sys.executable, "-c", _RAY_ALONE], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        if process.stdout.readline() != b"ready\n":
            raise RuntimeError("Ray alone did not start")
        return cpu_share(process.pid, seconds)
    finally:
        process.stdin.close()
        process.wait(60)


def rows(seconds: float) -> list[Row]:
    with tandem("--launcher", "ray") as cluster:
        pids = family(cluster.pid)
        share = cpu_share(cluster.pid, seconds)
        pss, rss = pss_bytes(pids), rss_bytes(pids)
        ready_s = cluster.ready_s
    base = ray_alone(seconds)
    how = f"default cluster on Ray, 1 prefill + 1 decode + router, {len(pids)} processes, idle for {seconds:g} s"
    return [
        Row(
            "idle.rss_gib",
            "memory of an idle cluster, RSS summed (shared pages counted again)",
            rss / GIB,
            "GiB",
            3.0,
            "<=",
            "",
            how,
        ),
        Row("idle.pss_gib", "memory of an idle cluster, PSS", pss / GIB, "GiB", None, "<=", "", how),
        Row("idle.cpu_above_ray", "idle CPU above idle Ray", share - base, "cores", 0.05, "<=", f"Ray alone {base:.3f}", how),
        Row("idle.ready_s", "ready after `tandem up`", ready_s, "s", 15.0, "<=", "", how),
    ]
