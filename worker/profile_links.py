"""Measures what moving KV costs here, by pulling blocks out of another process over each transport: see `tandem profile`.

Both ends are on this machine. Links to other machines are slower; the router learns of them when they are used.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from statistics import median

from core.blocks import BlockRecord, KvLayout, KvSource
from core.config import TransferConfig
from core.cost_fit import fit_link
from core.cost_model import LinkCost
from core.errors import TandemError, UnavailableError
from kvtransfer.channels import Channels
from kvtransfer.plane import build_transports, open_arena
from kvtransfer.transport import Transport
from tandem.cancelling import heed_cancellation
from worker.profile_source import BLOCK_TOKENS, EPOCH, KEY

NAMES = ("shm", "tcp", "grpc")
SIZES_BYTES = (2**16, 2**18, 2**20, 2**22, 2**24)
REPEATS = 7
START_TIMEOUT_S = 60.0
LINE_MAX_BYTES = 2**24
PULL_TIMEOUT_S = 30.0


def counts_of(layout: KvLayout) -> list[int]:
    """Blocks in each transfer that is measured, ascending, one at least."""
    return sorted({max(1, size // layout.block_bytes) for size in SIZES_BYTES} | {1})


async def measure_links(
    layout: KvLayout, shm_dir: str, on_pull: Callable[[], None], say: Callable[[str], None]
) -> dict[str, LinkCost]:
    """By transport. `on_pull` hears of each size on each; `say` of a transport that does not work here and is left out.

    Raises UnavailableError when the other process does not start.
    """
    counts = counts_of(layout)
    with tempfile.TemporaryDirectory(dir=shm_dir, prefix="tandem-profile-") as directory:
        config = TransferConfig(shm_dir=directory, pull_timeout_s=PULL_TIMEOUT_S)
        dest = open_arena(config, "profile-dest", EPOCH, counts[-1], layout.block_bytes)
        channels = Channels()
        try:
            async with _source(directory, layout.block_bytes, counts[-1]) as (source, records):
                transports = build_transports(config, dest.bytes_view(), channels)
                return await _each(transports, source, records, counts, on_pull, say)
        finally:
            await channels.close()
            dest.close()


async def _each(
    transports: dict[str, Transport],
    source: KvSource,
    records: list[BlockRecord],
    counts: list[int],
    on_pull: Callable[[], None],
    say: Callable[[str], None],
) -> dict[str, LinkCost]:
    links = {}
    for name in NAMES:
        try:
            links[name] = fit_link([await _pulls(transports[name], source, records[:count], on_pull) for count in counts])
        except (TandemError, ValueError) as error:
            heed_cancellation()
            say(f"{name} is left out: {error}")
    for transport in transports.values():
        await transport.close()
    return links


async def _pulls(
    transport: Transport, source: KvSource, records: list[BlockRecord], on_pull: Callable[[], None]
) -> tuple[int, float]:
    taken = []
    for turn in range(REPEATS + 1):
        started = time.perf_counter()
        result = await transport.pull(source, KEY, records, range(len(records)))
        if turn:  # the first one dials and maps
            taken.append(time.perf_counter() - started)
    on_pull()
    return result.bytes, median(taken)


@asynccontextmanager
async def _source(directory: str, block_bytes: int, num_blocks: int) -> AsyncIterator[tuple[KvSource, list[BlockRecord]]]:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "worker.profile_source", stdin=pipe, stdout=pipe, limit=LINE_MAX_BYTES
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        asked = {"directory": directory, "block_bytes": block_bytes, "num_blocks": num_blocks}
        process.stdin.write(json.dumps(asked).encode() + b"\n")
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                told = json.loads(await process.stdout.readline())
        except (TimeoutError, ValueError):
            raise UnavailableError("the process that serves blocks did not start; its error is above") from None
        places: list[tuple[int, int, int]] = told["places"]
        records = [BlockRecord(n, b"", *place, BLOCK_TOKENS) for n, place in enumerate(places)]
        yield KvSource("profile-source", EPOCH, told["grpc"], "here", told["path"], num_blocks, NAMES, told["tcp"]), records
    finally:
        process.stdin.close()
        try:
            async with asyncio.timeout(10):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
