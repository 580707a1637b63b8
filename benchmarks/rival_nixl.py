"""NIXL's UCX backend between two processes of one host, run in its own environment by `benchmarks.rounds`.

python rival_nixl.py BYTES_MAX BLOCK_BYTES

For every size it tries READ and WRITE, in one piece and block by block, a few times and takes its turns with the quickest.
Transfers are prepared once, as a user that repeats them would.
"""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import time
from statistics import median

import torch
from nixl._api import nixl_agent, nixl_agent_config

TRIES = 4


def agent(name: str):
    return nixl_agent(name, nixl_agent_config(enable_prog_thread=True, backends=["UCX"]))


def target(size: int) -> None:
    made, memory = agent(f"target{os.getpid()}"), torch.zeros(size, dtype=torch.uint8)
    made.register_memory([memory])
    print("told", base64.b64encode(made.get_agent_metadata()).decode(), memory.data_ptr(), flush=True)
    for line in sys.stdin:
        print("sum", int(memory[: int(line)].to(torch.int64).sum()), flush=True)


class Ways:
    """Prepared transfers by (operation, piece size)."""

    def __init__(self, made, peer: str, here: int, there: int, block: int) -> None:
        self._made, self._peer, self._here, self._there, self._block = made, peer, here, there, block
        self._handles: dict = {}

    def names(self, size: int) -> list[tuple[str, int, int]]:
        return [(operation, size, piece) for operation in ("READ", "WRITE") for piece in (size, self._block)]

    def took_s(self, way: tuple[str, int, int]) -> float:
        if way not in self._handles:
            operation, size, piece = way
            local, remote = (
                self._made.get_xfer_descs([(base + at, piece, 0) for at in range(0, size, piece)], mem_type="DRAM")
                for base in (self._here, self._there)
            )
            self._handles[way] = self._made.initialize_xfer(operation, local, remote, self._peer, b"")
        started = time.perf_counter()
        state = self._made.transfer(self._handles[way])
        while state != "DONE":
            if state == "ERR":
                raise SystemExit("a transfer failed")
            state = self._made.check_xfer_state(self._handles[way])
        return time.perf_counter() - started


def main() -> None:
    size_max, block = int(sys.argv[1]), int(sys.argv[2])
    if "--target" in sys.argv:
        target(size_max)
        return
    command = [sys.executable, __file__, *sys.argv[1:], "--target"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        _, metadata, there = next(line for line in other.stdout if line.startswith("told")).split()
        made, memory = agent(f"initiator{os.getpid()}"), torch.randint(0, 255, (size_max,), dtype=torch.uint8)
        made.register_memory([memory])
        ways = Ways(made, made.add_remote_agent(base64.b64decode(metadata)), memory.data_ptr(), int(there), block)
        ways.took_s(("WRITE", size_max, size_max))
        other.stdin.write(f"{size_max}\n")
        other.stdin.flush()
        said = next(line for line in other.stdout if line.startswith("sum"))
        if int(said.split()[1]) != int(memory.to(torch.int64).sum()):
            raise SystemExit("the bytes that arrived are others")
        print("ready: UCX", os.environ.get("UCX_TLS", "as it comes"), flush=True)
        best: dict = {}
        for line in sys.stdin:
            size = int(line)
            if size not in best:
                best[size] = min(ways.names(size), key=lambda way: median(ways.took_s(way) for _ in range(TRIES)))
            print(f"took {ways.took_s(best[size]):.9f}", flush=True)
        other.stdin.close()


if __name__ == "__main__":
    main()
