"""A source of blocks as a real process that serves every transport and can be stopped, continued and killed.

    python killable_source.py DIRECTORY NUM_BLOCKS BLOCK_BYTES BACKEND

Prints one line of JSON. A line of standard input ends its tcp server, the end of standard input everything.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

from core.blocks import BlockRecord, KvSource
from core.clock import SystemClock
from core.inventory import Inventory
from core.request import AttemptKey
from core.service import Registration, serve
from kvtransfer.codec import digests_of
from kvtransfer.collective_helper import Helper
from kvtransfer.collective_service import CollectiveServicer
from kvtransfer.exports import Exports
from kvtransfer.service import KvServicer
from kvtransfer.shared_arena import SharedArena
from kvtransfer.tcp_server import TcpServer
from tandem.v1.kv_pb2_grpc import add_KvCollectiveServicer_to_server, add_KvServicer_to_server

KEY = AttemptKey("request", 1)
EPOCH = 7
ROOT = Path(__file__).resolve().parents[2]


def bytes_of(num_blocks: int, block_bytes: int) -> np.ndarray:
    """What the source's blocks hold."""
    return np.random.default_rng(5).integers(0, 256, (num_blocks, block_bytes), np.uint8)


class KillableSource:
    """`backend`: what its groups are of; none when collective is not asked of it, which spares it torch."""

    def __init__(self, directory: str, num_blocks: int, block_bytes: int, backend: str = "none", env=None) -> None:
        command = [sys.executable, __file__, directory, str(num_blocks), str(block_bytes), backend]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": ".", **(env or {})},
        )
        told = json.loads(self._process.stdout.readline())
        self._pids = [self._process.pid, *told["helper"]]
        self.records = [BlockRecord(n, bytes(16), *place, 16) for n, place in enumerate(told["places"])]
        names = ("shm", "tcp", "collective", "grpc")
        self.kv = KvSource("prefill-0", EPOCH, told["grpc"], "here", told["path"], num_blocks, names, told["tcp"])

    def stop(self) -> None:
        for pid in self._pids:
            os.kill(pid, signal.SIGSTOP)

    def go_on(self) -> None:
        for pid in self._pids:
            os.kill(pid, signal.SIGCONT)

    def kill(self) -> None:
        """The worker alone: its helper has to notice by itself."""
        self._process.kill()
        self._process.wait()
        for pid in self._pids[1:]:
            os.kill(pid, signal.SIGCONT)

    def end_tcp(self) -> None:
        """Ends the tcp server in the process, connections and all; the rest stays."""
        self._process.stdin.write(b"end tcp\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == b"ended\n"

    def close(self) -> None:
        if self._process.returncode is None:
            self.go_on()
            self.kill()
        for stream in (self._process.stdin, self._process.stdout):
            stream.close()


async def main(directory: str, num_blocks: int, block_bytes: int, backend: str) -> None:
    arena = SharedArena(directory, "prefill-0", EPOCH, num_blocks, block_bytes)
    arena.bytes_view()[:] = bytes_of(num_blocks, block_bytes)
    inventory = Inventory(num_blocks, arena.generation_words())
    blocks = inventory.allocate(num_blocks)
    exports = Exports(EPOCH, arena, inventory, SystemClock())
    exports.open(KEY, 3600.0)
    digests = digests_of(arena.bytes_view(), blocks)
    places = [(block, inventory.generation(block), digest) for block, digest in zip(blocks, digests, strict=True)]
    exports.announce(KEY, [BlockRecord(n, bytes(16), *place, 16) for n, place in enumerate(places)])
    services = [Registration("tandem.v1.Kv", add_KvServicer_to_server, KvServicer(exports))]
    helper = None
    if backend != "none":
        helper = Helper(backend, "127.0.0.1", directory)
        await helper.backend()
        servicer = CollectiveServicer(exports, helper)
        services.append(Registration("tandem.v1.KvCollective", add_KvCollectiveServicer_to_server, servicer))
    server = TcpServer(exports, "127.0.0.1:0")
    async with serve("127.0.0.1:0", *services, grace_s=0.0) as grpc_server:
        told = {"grpc": grpc_server.address, "tcp": server.address, "path": arena.path, "places": places}
        told["helper"] = [] if helper is None else [helper._process.popen.pid]
        print(json.dumps(told), flush=True)
        if await asyncio.to_thread(sys.stdin.readline):
            server.close()
            print("ended", flush=True)
            await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]))
