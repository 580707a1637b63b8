"""Run as a script: a process that writes blocks is killed in mid-write, again and again; each time all that is served is whole.

    python tests/contract/disk_crash_rounds.py DIRECTORY ROUNDS SEED

Each round forks a writer, kills it (SIGKILL) after a random time, forks a reader on what it left. What the writer had seen
written (it says so through a pipe) must be served, unless it was dropped for want of room. Prints the blocks checked.
"""

from __future__ import annotations

import asyncio
import os
import random
import select
import signal
import struct
import sys
from pathlib import Path

import numpy as np
from disk_rig import block, key, segment_paths

from core.blocks import KvLayout
from kvtransfer.disk import DiskOptions, DiskTier

LAYOUT = KvLayout(b"\x23" * 16, "float32", 2, 2, 32, 16)  # 16 KiB
ROOM = 12 * 2**20
PER_ROUND = 4096
NUMBER = struct.Struct("<q")


def opened(directory: Path) -> DiskTier:
    return DiskTier.open(directory, LAYOUT, ROOM, DiskOptions(queue_bytes=2**19, segment_bytes=2**20))


async def write(directory: Path, first: int, told: int) -> None:
    disk = opened(directory)
    for n in range(first, first + PER_ROUND):
        disk.put(key(n), block(key(n), LAYOUT))
        if n % 16 == 15:
            assert await disk.flush()
            os.write(told, NUMBER.pack(n))
        if n % 64 == 63:
            await disk.evict(key(n - 32))
    await disk.close()


async def check(directory: Path, first: int, seen: int) -> int:
    """Returns the number of blocks served."""
    disk = opened(directory)
    keys = disk.keys()
    out = np.empty((len(keys), LAYOUT.block_bytes), np.uint8)
    assert all(await disk.get(keys, list(out))), "a record that survived is not whole"
    for one, got in zip(keys, out, strict=True):
        assert np.array_equal(got, block(one, LAYOUT)), f"{one.hex()} is served with other bytes"
    newest = range(max(first, seen - 255), seen + 1)  # a quarter of the room: never dropped
    missing = [n for n in newest if not any(disk.contains([key(n)])) and n % 64 != 31]
    assert not missing, f"written and lost: {missing}"
    evicted = [n for n in range(first, seen - 63) if n % 64 == 31 and any(disk.contains([key(n)]))]
    assert not evicted, f"evicted and back again: {evicted}"
    assert sum(path.stat().st_size for path in segment_paths(directory)) <= ROOM
    await disk.close()
    return len(keys)


def forked(work: object) -> int:
    """A child that runs the coroutine and ends with 0, or with 1 and a stack trace."""
    pid = os.fork()
    if pid == 0:
        try:
            asyncio.run(work)  # type: ignore[arg-type]
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    work.close()  # type: ignore[attr-defined]
    return pid


def killed_after(pid: int, delay_s: float, pipe: int) -> int:
    """Kills the child after a while and returns the last number it told, -1 for none."""
    poll = select.epoll()  # an empty one: a wait with a deadline and no early end
    poll.poll(delay_s)
    poll.close()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    told = b""
    while part := os.read(pipe, 65536):
        told += part
    return NUMBER.unpack_from(told, len(told) - NUMBER.size)[0] if told else -1


async def checked(directory: Path, first: int, seen: int, out: int) -> None:
    os.write(out, NUMBER.pack(await check(directory, first, seen)))


def main(directory: Path, rounds: int, seed: int) -> int:
    chance, total = random.Random(seed), 0
    for number in range(rounds):
        first = number * PER_ROUND
        reader, writer = os.pipe()
        pid = forked(write(directory, first, writer))
        os.close(writer)
        seen = killed_after(pid, chance.uniform(0.005, 0.12), reader)
        os.close(reader)
        reader, writer = os.pipe()
        _, status = os.waitpid(forked(checked(directory, first, seen, writer)), 0)
        os.close(writer)
        if status:
            raise SystemExit(f"round {number}, seed {seed}")
        total += NUMBER.unpack(os.read(reader, NUMBER.size))[0]
        os.close(reader)
    return total


if __name__ == "__main__":
    print(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
