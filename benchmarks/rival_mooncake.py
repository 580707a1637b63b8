"""Mooncake's Transfer Engine over TCP on loopback, in its own environment: run by `benchmarks.kv_tcp`, imports nothing of ours.

python rival_mooncake.py BYTES      prints `GB/s X`, the best median of reads and writes between two processes
"""

from __future__ import annotations

import subprocess
import sys
import time
from statistics import median

import numpy as np

ROUNDS = 9


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
    sys.stdin.read()


def seconds(move, peer: str, here: int, there: int, size: int) -> float:
    took = []
    for _ in range(ROUNDS + 1):
        started = time.perf_counter()
        if move(peer, here, there, size) != 0:
            raise SystemExit("a transfer failed")
        took.append(time.perf_counter() - started)
    return median(took[1:])


def main() -> None:
    size = int(sys.argv[1])
    if "--target" in sys.argv:
        target(size)
        return
    command = [sys.executable, __file__, str(size), "--target"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        peer, there = next(line for line in other.stdout if line.startswith("127.0.0.1:")).split()
        made = engine()
        here = registered(made, size).ctypes.data
        moves = (made.transfer_sync_read, made.transfer_sync_write)
        best_s = min(seconds(move, peer, here, int(there), size) for move in moves)
        other.stdin.close()
    print(f"GB/s {size / best_s / 1e9:.3f}")


if __name__ == "__main__":
    main()
