"""Mooncake's Transfer Engine over TCP on loopback, run in its own environment by `benchmarks.rounds`; imports nothing of ours.

python rival_mooncake.py BYTES_MAX BLOCK_BYTES

Two processes. For every size it tries its ways of moving that many bytes (a read or a write, in one piece or block by block
in one batch) a few times, and then takes its turns with the quickest.
"""

from __future__ import annotations

import subprocess
import sys
import time
from statistics import median

import numpy as np

TRIES = 4


def engine():
    from mooncake.engine import TransferEngine

    made = TransferEngine()
    if made.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") != 0:
        raise SystemExit("the transfer engine does not start")
    return made


def registered(made, size: int) -> np.ndarray:
    memory = np.ones(size, np.uint8)
    if made.register_memory(memory.ctypes.data, size) != 0:
        raise SystemExit("the transfer engine does not take the memory")
    return memory


def target(size: int) -> None:
    made = engine()
    memory = registered(made, size)
    print(f"127.0.0.1:{made.get_rpc_port()} {memory.ctypes.data}", flush=True)
    for _ in sys.stdin:
        print(f"sum {int(memory[-4096:].astype(np.uint64).sum())}", flush=True)


def ways(made, peer: str, here: int, there: int, block: int) -> dict:
    def batch(move):
        def work(size: int) -> int:
            places = range(0, size, block)
            return move(peer, [here + at for at in places], [there + at for at in places], [block] * len(places))

        return work

    return {
        "read": lambda size: made.transfer_sync_read(peer, here, there, size),
        "write": lambda size: made.transfer_sync_write(peer, here, there, size),
        "batch of reads": batch(made.batch_transfer_sync_read),
        "batch of writes": batch(made.batch_transfer_sync_write),
    }


def took_s(way, size: int) -> float:
    started = time.perf_counter()
    if way(size) != 0:
        raise SystemExit("a transfer failed")
    return time.perf_counter() - started


def main() -> None:
    size_max, block = int(sys.argv[1]), int(sys.argv[2])
    if "--target" in sys.argv:
        target(size_max)
        return
    command = [sys.executable, __file__, str(size_max), str(block), "--target"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        peer, there = next(line for line in other.stdout if line.startswith("127.0.0.1:")).split()
        made = engine()
        memory = registered(made, size_max)
        memory[:] = np.random.default_rng(0).integers(0, 256, size_max, np.uint8)
        known = ways(made, peer, memory.ctypes.data, int(there), block)
        known["write"](size_max)
        other.stdin.write("sum\n")
        other.stdin.flush()
        said = next(line for line in other.stdout if line.startswith("sum"))
        if int(said.split()[1]) != int(memory[-4096:].astype(np.uint64).sum()):
            raise SystemExit("the bytes that arrived are others")
        print(f"ready: over tcp, {block} bytes a block", flush=True)
        best: dict[int, str] = {}
        for line in sys.stdin:
            size = int(line)
            if size not in best:
                best[size] = min(known, key=lambda name: median(took_s(known[name], size) for _ in range(TRIES)))
                print(f"{size} bytes: its quickest way is a {best[size]}", file=sys.stderr, flush=True)
            print(f"took {took_s(known[best[size]], size):.9f}", flush=True)
        other.stdin.close()


if __name__ == "__main__":
    main()
