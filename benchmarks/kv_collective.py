"""Moving 64 MiB of KV blocks between two processes through a torch.distributed group (gloo) on loopback.

Claims
- collective: a pull, asking and generation checks included (digest off), reaches 0.9 x bare torch.distributed send and recv of
  the same bytes, whichever is quicker: one tensor, or pieces of 4 MiB that are on their way together.
- The cost of digests, and of blocks whose order differs between the ends, is stated.

    python -m benchmarks.kv_collective [--quick] [--json FILE]
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import tempfile
from collections.abc import MutableSequence
from contextlib import AsyncExitStack
from typing import cast

import numpy as np

from benchmarks.rounds import in_turns, rival, timed, times
from benchmarks.rows import Row, arguments, report
from core.blocks import BlockRecord, KvSource
from core.clock import SystemClock
from core.config import TransferConfig
from core.inventory import Inventory
from core.request import AttemptKey
from core.service import serve
from kvtransfer.channels import Channels
from kvtransfer.codec import digests_of
from kvtransfer.collective_end import CollectiveEnd
from kvtransfer.exports import Exports
from kvtransfer.shared_arena import SharedArena

BLOCK_BYTES = 64 * 1024
MIB = 2**20
SIZE = 64 * MIB
NUM_BLOCKS = SIZE // BLOCK_BYTES
KEY = AttemptKey("bench", 1)
EPOCH = 1
HOST = "127.0.0.1"


def settings(directory: str, digest: bool = True) -> TransferConfig:
    return TransferConfig(transport="collective", collective="gloo", shm_dir=directory, digest=digest, pull_timeout_s=60.0)


async def source_main(directory: str) -> None:
    """The other process: announced blocks behind groups, until standard input ends."""
    arena = SharedArena(directory, "bench", EPOCH, NUM_BLOCKS, BLOCK_BYTES)
    view = arena.bytes_view()
    view[:] = np.random.default_rng(0).integers(0, 256, view.shape, np.uint8)
    inventory = Inventory(NUM_BLOCKS, cast(MutableSequence[int], arena.generation_words()))
    blocks = inventory.allocate(NUM_BLOCKS)
    exports = Exports(EPOCH, arena, inventory, SystemClock())
    exports.open(KEY, 3600.0)
    digests = digests_of(view, blocks)
    places = [(block, inventory.generation(block), digest) for block, digest in zip(blocks, digests, strict=True)]
    exports.announce(KEY, [BlockRecord(n, b"", *place, 16) for n, place in enumerate(places)])
    end = CollectiveEnd(settings(directory), arena, HOST)
    await end.helper.backend()
    async with serve(f"{HOST}:0", end.registration(exports)) as server:
        print(json.dumps({"grpc": server.address, "places": places}), flush=True)
        await asyncio.to_thread(sys.stdin.read)
    await end.close()
    await exports.close()
    arena.close()


async def measure(directory: str, rounds: int) -> list[Row]:
    command = [sys.executable, "-m", "benchmarks.kv_collective", "--source", directory]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, limit=4 * MIB)
    stdin, stdout = cast(asyncio.StreamWriter, process.stdin), cast(asyncio.StreamReader, process.stdout)
    try:
        async with AsyncExitStack() as stack:
            return await _rows(json.loads(await asyncio.wait_for(stdout.readline(), 120)), directory, stack, rounds)
    finally:
        stdin.close()
        await process.wait()


async def _rows(told: dict[str, object], directory: str, stack: AsyncExitStack, rounds: int) -> list[Row]:
    places = cast("list[tuple[int, int, int]]", told["places"])
    records = [BlockRecord(n, b"", *place, 16) for n, place in enumerate(places)]
    kv = KvSource("bench", EPOCH, str(told["grpc"]), "here", "", NUM_BLOCKS, ("collective",))
    arena = SharedArena(directory, "dest", EPOCH, NUM_BLOCKS, BLOCK_BYTES)
    stack.callback(arena.close)
    end, checking = (CollectiveEnd(settings(directory, digest), arena, HOST) for digest in (False, True))
    channels = Channels()
    for close in (end.close, checking.close, channels.close):
        stack.push_async_callback(close)
    plain, checked = end.transport(channels), checking.transport(channels)
    straight = list(range(NUM_BLOCKS))
    scattered = random.Random(0).sample(straight, NUM_BLOCKS)
    bare = await stack.enter_async_context(rival("gloo", "rival_gloo.py", str(SIZE + 1), ours=True))
    contenders = {
        "ours": timed(lambda: plain.pull(kv, KEY, records, straight)),
        "digest": timed(lambda: checked.pull(kv, KEY, records, straight)),
        "scattered": timed(lambda: plain.pull(kv, KEY, records, scattered)),
        **({"whole": bare.moves(SIZE), "pieces": bare.moves(SIZE + 1)} if bare else {}),
    }
    seen = await in_turns(contenders, rounds)
    await plain.close()
    await checked.close()
    quickest = min(("whole", "pieces"), key=lambda name: seen.get(name, float("inf")))
    size = SIZE / 1e9
    each = ", ".join(f"{name} {size / seconds:.2f} GB/s" for name, seconds in seen.items())
    how = f"blocks of 64 KiB, another process, median of {rounds} rounds in turns: {each}"
    peer = "torch.distributed"
    return [
        Row("gloo_64mib_gbps", "gloo pull, 64 MiB", size / seen["ours"], "GB/s", how=how),
        Row("gloo_64mib", "gloo pull against bare send/recv", times(seen, "ours", quickest), "x", 0.9, ">=", peer, how),
        Row("gloo_digest_64mib", "the same with digests", times(seen, "digest", quickest), "x", None, ">=", peer, how),
        Row(
            "gloo_scattered_64mib",
            "the same with scattered blocks",
            times(seen, "scattered", quickest),
            "x",
            None,
            ">=",
            peer,
            how,
        ),
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--source", help="run as the source process, with its arena in this directory")
    parser.add_argument("--shm-dir", default="/dev/shm")
    options = parser.parse_args()
    if options.source:
        asyncio.run(source_main(options.source))
        return
    with tempfile.TemporaryDirectory(dir=options.shm_dir, prefix="tandem-bench-") as directory:
        rows = asyncio.run(measure(directory, 11 if options.quick else 31))
    report(rows, options.json)


if __name__ == "__main__":
    main()
