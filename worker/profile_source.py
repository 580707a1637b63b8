"""The other end of a measured link: blocks in a process of their own, served over everything they can be pulled by.

    python -m worker.profile_source

One line of JSON in (directory, block_bytes, num_blocks), one line out (where the blocks are); ends with standard input.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import MutableSequence
from typing import cast

from core.blocks import BlockRecord
from core.clock import SystemClock
from core.config import TransferConfig
from core.inventory import Inventory
from core.request import AttemptKey
from core.service import Registration, serve
from kvtransfer.codec import digests_of
from kvtransfer.exports import Exports
from kvtransfer.plane import open_arena, open_tcp
from kvtransfer.service import KvServicer
from tandem.v1.kv_pb2_grpc import add_KvServicer_to_server

KEY = AttemptKey("profile", 1)
EPOCH = 1
BLOCK_TOKENS = 16  # of a record; nothing here depends on it
LEASE_S = 3600.0


async def main() -> None:
    told = json.loads(await asyncio.to_thread(sys.stdin.readline))
    config = TransferConfig(shm_dir=told["directory"])
    arena = open_arena(config, "profile-source", EPOCH, told["num_blocks"], told["block_bytes"])
    view = arena.bytes_view()
    view[:] = 7
    inventory = Inventory(told["num_blocks"], cast(MutableSequence[int], arena.generation_words()))
    blocks = inventory.allocate(told["num_blocks"])
    exports = Exports(EPOCH, arena, inventory, SystemClock())
    exports.open(KEY, LEASE_S)
    places = [(b, inventory.generation(b), digest) for b, digest in zip(blocks, digests_of(view, blocks), strict=True)]
    exports.announce(KEY, [BlockRecord(n, b"", *place, BLOCK_TOKENS) for n, place in enumerate(places)])
    tcp = open_tcp(config, exports, "127.0.0.1:0")
    try:
        async with serve("127.0.0.1:0", Registration("tandem.v1.Kv", add_KvServicer_to_server, KvServicer(exports))) as server:
            where = {"grpc": server.address, "tcp": tcp.address if tcp else "", "path": arena.path, "places": places}
            print(json.dumps(where), flush=True)
            while await asyncio.to_thread(sys.stdin.readline):
                pass
    finally:
        if tcp is not None:
            tcp.close()
        await exports.close()
        arena.close()


if __name__ == "__main__":
    asyncio.run(main())
