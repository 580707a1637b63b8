"""The other process of the transfer benchmarks: announced blocks behind everything of ours that they can be pulled over, and
the same bytes behind bare sockets and bare grpc.aio.

    python -m benchmarks.kv_source DIRECTORY BLOCK_BYTES NUM_BLOCKS

Prints one line of JSON. Then, per line of standard input: `trace` begins to count what Python allocates, `peak` prints the
most it held since, in bytes. Ends with standard input.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, MutableSequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import cast

import numpy as np

from benchmarks.kv_bare import GRPC_OPTIONS, serve_grpc, serve_sockets
from core.blocks import BlockRecord, KvSource
from core.clock import SystemClock
from core.inventory import Inventory
from core.request import AttemptKey
from core.service import Registration, serve
from kvtransfer.arena import Blocks
from kvtransfer.codec import digests_of
from kvtransfer.exports import Exports
from kvtransfer.service import KvServicer
from kvtransfer.shared_arena import SharedArena
from kvtransfer.tcp_server import TcpServer
from kvtransfer.transport import Transport
from tandem.v1.kv_pb2_grpc import add_KvServicer_to_server

KEY = AttemptKey("bench", 1)
EPOCH = 1
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Source:
    """What pulls need to know of the other process, and a destination as large as what it holds."""

    kv: KvSource
    records: list[BlockRecord]
    dest: Blocks
    directory: str
    socket_port: int
    grpc_ports: dict[str, int]
    ask: Callable[[str], Awaitable[str]]

    def count(self, size: int) -> int:
        return size // int(self.dest.shape[1])

    async def pull(self, transport: Transport, size: int) -> None:
        count = self.count(size)
        await transport.pull(self.kv, KEY, self.records[:count], range(count))


@asynccontextmanager
async def source(block_bytes: int, size: int, shm_dir: str = "/dev/shm") -> AsyncIterator[Source]:
    """`size` bytes in blocks of `block_bytes`, in a process of their own until the block ends."""
    with tempfile.TemporaryDirectory(dir=shm_dir, prefix="tandem-bench-") as directory:
        command = [sys.executable, "-m", "benchmarks.kv_source", directory, str(block_bytes), str(size // block_bytes)]
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, limit=4 * MIB)
        stdin, stdout = cast(asyncio.StreamWriter, process.stdin), cast(asyncio.StreamReader, process.stdout)

        async def ask(word: str) -> str:
            stdin.write(word.encode() + b"\n")
            return (await asyncio.wait_for(stdout.readline(), 30)).decode()

        try:
            told = json.loads(await asyncio.wait_for(stdout.readline(), 60))
            records = [BlockRecord(n, b"", *place, 16) for n, place in enumerate(told["places"])]
            kv = KvSource("bench", EPOCH, told["grpc"], "here", told["path"], len(records), ("shm", "tcp", "grpc"), told["tcp"])
            arena = SharedArena(directory, "dest", EPOCH, len(records), block_bytes)
            yield Source(kv, records, arena.bytes_view(), directory, told["socket_port"], told["grpc_ports"], ask)
            arena.close()
        finally:
            stdin.close()
            await process.wait()


async def main(directory: str, block_bytes: int, num_blocks: int) -> None:
    arena = SharedArena(directory, "bench", EPOCH, num_blocks, block_bytes)
    view = arena.bytes_view()
    view[:] = np.random.default_rng(0).integers(0, 256, view.shape, np.uint8)
    inventory = Inventory(num_blocks, cast(MutableSequence[int], arena.generation_words()))
    blocks = inventory.allocate(num_blocks)
    exports = Exports(EPOCH, arena, inventory, SystemClock())
    exports.open(KEY, 3600.0)
    digests = digests_of(view, blocks)
    places = [(block, inventory.generation(block), digest) for block, digest in zip(blocks, digests, strict=True)]
    exports.announce(KEY, [BlockRecord(n, b"", *place, 16) for n, place in enumerate(places)])
    tcp = TcpServer(exports, "127.0.0.1:0")
    sockets = serve_sockets([view[block].data for block in blocks])
    bare = {name: await serve_grpc(view[blocks].tobytes(), options) for name, options in GRPC_OPTIONS.items()}
    async with serve("127.0.0.1:0", Registration("tandem.v1.Kv", add_KvServicer_to_server, KvServicer(exports))) as server:
        told = {
            "grpc": server.address,
            "tcp": tcp.address,
            "path": arena.path,
            "places": places,
            "socket_port": sockets.getsockname()[1],
            "grpc_ports": {name: port for name, (_, port) in bare.items()},
        }
        print(json.dumps(told), flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            print(_traced(line.strip()), flush=True)
    for one, _ in bare.values():
        await one.stop(None)
    sockets.close()
    tcp.close()
    await exports.close()
    arena.close()


def _traced(word: str) -> str:
    if word == "trace":
        tracemalloc.start()
        tracemalloc.reset_peak()
        return "tracing"
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return str(peak)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
