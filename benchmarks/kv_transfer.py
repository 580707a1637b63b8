"""Moving KV blocks between two workers of one host.

Claims
- shm: a pull out of another process's mapped arena takes no longer than 1 / 0.8 of a one-thread memcpy of the same bytes
  between two pre-faulted mapped regions (digest off), at 16 MiB and 64 MiB.
- shm with digests, gRPC, and the cost of a pull of a single block are stated.

Source and destination are separate processes; the memcpy runs in the destination, interleaved with the pulls, so that both
see the same machine. Every figure is the median over rounds.

    python -m benchmarks.kv_transfer [--quick] [--json FILE] [--shm-dir DIR]
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable, MutableSequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import cast

import numpy as np

from benchmarks.rows import Row, arguments, report
from core.blocks import BlockRecord, KvSource
from core.clock import SystemClock
from core.inventory import Inventory
from core.request import AttemptKey
from core.service import Registration, serve
from kvtransfer.arena import Blocks
from kvtransfer.channels import Channels
from kvtransfer.codec import digests_of
from kvtransfer.copier import Copier
from kvtransfer.exports import Exports
from kvtransfer.grpc_transport import GrpcTransport
from kvtransfer.service import KvServicer
from kvtransfer.shared_arena import SharedArena
from kvtransfer.shm import ShmTransport
from kvtransfer.transport import Transport
from tandem.v1.kv_pb2_grpc import add_KvServicer_to_server

BLOCK_BYTES = 96 * 1024  # the demo model's: 16 tokens of 6 layers, 2 heads of 64, fp32
SIZES_MIB = (16, 64)
KEY = AttemptKey("bench", 1)
EPOCH = 1
MIB = 2**20


async def source_main(directory: str) -> None:
    """The other process: an arena full of announced blocks behind a Kv service, until its standard input ends."""
    num_blocks = SIZES_MIB[-1] * MIB // BLOCK_BYTES
    arena = SharedArena(directory, "bench", EPOCH, num_blocks, BLOCK_BYTES)
    arena.bytes_view()[:] = np.random.default_rng(0).integers(0, 256, arena.bytes_view().shape, np.uint8)
    inventory = Inventory(num_blocks, cast(MutableSequence[int], arena.generation_words()))
    blocks = inventory.allocate(num_blocks)
    exports = Exports(EPOCH, arena, inventory, SystemClock())
    exports.open(KEY, 3600.0)
    digests = digests_of(arena.bytes_view(), blocks)
    records = [
        BlockRecord(index, b"", block, inventory.generation(block), digest, 16)
        for index, (block, digest) in enumerate(zip(blocks, digests, strict=True))
    ]
    exports.announce(KEY, records)
    async with serve("127.0.0.1:0", Registration("tandem.v1.Kv", add_KvServicer_to_server, KvServicer(exports))) as server:
        places = [(r.block_id, r.generation, r.digest) for r in records]
        print(json.dumps({"address": server.address, "path": arena.path, "records": places}), flush=True)
        await asyncio.to_thread(sys.stdin.read)
    await exports.close()
    arena.close()


@dataclass
class Bench:
    source: KvSource
    records: list[BlockRecord]
    dest: Blocks
    rounds: int

    async def pull_gbps(self, transport: Transport, mib: int) -> float:
        count = mib * MIB // BLOCK_BYTES
        seconds = []
        for _ in range(self.rounds + 1):  # the first one maps and dials
            started = time.perf_counter()
            await transport.pull(self.source, KEY, self.records[:count], range(count))
            seconds.append(time.perf_counter() - started)
        return count * BLOCK_BYTES / median(seconds[1:]) / 1e9

    async def beside_memcpy(self, transport: Transport, mib: int, memcpy: Callable[[int], None]) -> tuple[float, float]:
        """(pull, memcpy) in GB/s, measured in turns."""
        count = mib * MIB // BLOCK_BYTES
        await transport.pull(self.source, KEY, self.records[:count], range(count))
        memcpy(count)
        pulls, copies = [], []
        for _ in range(self.rounds):
            started = time.perf_counter()
            await transport.pull(self.source, KEY, self.records[:count], range(count))
            pulled = time.perf_counter()
            memcpy(count)
            pulls.append(pulled - started)
            copies.append(time.perf_counter() - pulled)
        size = count * BLOCK_BYTES / 1e9
        return size / median(pulls), size / median(copies)

    async def one_block_us(self, transport: Transport) -> float:
        seconds = []
        for index in range(min(len(self.records), 20 * self.rounds)):
            started = time.perf_counter()
            await transport.pull(self.source, KEY, self.records[index : index + 1], [0])
            seconds.append(time.perf_counter() - started)
        return median(seconds) * 1e6


async def measure(directory: str, quick: bool) -> list[Row]:
    command = [sys.executable, "-m", "benchmarks.kv_transfer", "--source", directory]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, limit=MIB)
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        told = json.loads(await asyncio.wait_for(process.stdout.readline(), 60))
        places = enumerate(told["records"])
        records = [BlockRecord(i, b"", block, generation, digest, 16) for i, (block, generation, digest) in places]
        source = KvSource("bench", EPOCH, told["address"], "here", told["path"], len(records), ("shm", "grpc"))
        dest = SharedArena(directory, "dest", EPOCH, len(records), BLOCK_BYTES)
        bench = Bench(source, records, dest.bytes_view(), 9 if quick else 31)
        rows = await _rows(bench, directory)
        dest.close()
        return rows
    finally:
        process.stdin.close()
        await process.wait()


async def _rows(bench: Bench, directory: str) -> list[Row]:
    other = SharedArena(directory, "memcpy", EPOCH, len(bench.records), BLOCK_BYTES)
    other.bytes_view()[:] = 1

    def memcpy(count: int) -> None:
        np.copyto(bench.dest[:count], other.bytes_view()[:count])

    plain, checked = (ShmTransport(Copier(bench.dest, digest=on, timeout_s=60.0), directory) for on in (False, True))
    channels = Channels()
    remote = GrpcTransport(bench.dest, channels, digest=True, timeout_s=60.0)
    how = f"blocks of {BLOCK_BYTES // 1024} KiB, another process's arena, median of {bench.rounds} rounds"
    rows = []
    for mib in SIZES_MIB:
        bare, copy = await bench.beside_memcpy(plain, mib, memcpy)
        digested, copy_too = await bench.beside_memcpy(checked, mib, memcpy)
        rows += [
            Row(f"memcpy_{mib}mib", f"one-thread memcpy, {mib} MiB", copy, "GB/s", how=how),
            Row(f"shm_{mib}mib", f"shm pull against that memcpy, {mib} MiB", bare / copy, "x", 0.8, ">=", "memcpy", how),
            Row(f"shm_digest_{mib}mib", f"the same with digests, {mib} MiB", digested / copy_too, "x", peer="memcpy", how=how),
            Row(f"grpc_{mib}mib", f"gRPC pull with digests, {mib} MiB", await bench.pull_gbps(remote, mib), "GB/s", how=how),
        ]
    transports: tuple[Transport, ...] = (checked, remote)
    for transport in transports:
        took_us, what = await bench.one_block_us(transport), f"{transport.name} pull of one block"
        rows.append(Row(f"{transport.name}_block", what, took_us, "us", None, "<=", how=how))
    await plain.close()
    await checked.close()
    await channels.close()
    other.close()
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--source", help="run as the source process, with its arena in this directory")
    parser.add_argument("--shm-dir", default="/dev/shm")
    options = parser.parse_args()
    if options.source:
        asyncio.run(source_main(options.source))
        return
    with tempfile.TemporaryDirectory(dir=options.shm_dir, prefix="tandem-bench-") as directory:
        rows = asyncio.run(measure(str(Path(directory)), options.quick))
    report(rows, options.json)


if __name__ == "__main__":
    main()
