"""Every transport between processes against a source that is slow, stands still, and is killed with SIGKILL half-way.

One source process and one destination per transport, in the order of the tests: the last one kills it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import numpy as np
import pytest
import pytest_asyncio
from killable_source import EPOCH, KEY, KillableSource, bytes_of
from transport_suite import UNTOUCHED, settle, until

from core.clock import SystemClock
from core.errors import TransferError
from kvtransfer.channels import Channels
from kvtransfer.collective import CollectiveTransport
from kvtransfer.collective_helper import Helper
from kvtransfer.copier import Copier
from kvtransfer.fetch import Fetcher
from kvtransfer.grpc_transport import GrpcTransport
from kvtransfer.shared_arena import SharedArena
from kvtransfer.shm import ShmTransport
from kvtransfer.tcp import TcpTransport
from kvtransfer.transport import Transport

pytestmark = [pytest.mark.service, pytest.mark.asyncio(loop_scope="module")]

NUM_BLOCKS, BLOCK_BYTES = 64, 2**20
PLACES = list(range(NUM_BLOCKS - 1, -1, -1))  # scattered for those who care
SOON_S = 20.0  # far below a hang, far above what a loaded machine needs


@dataclass
class Ends:
    source: KillableSource
    dest: SharedArena
    transport: Transport
    brief: Transport
    """The same with a timeout of half a second."""

    def pull(self, transport: Transport | None = None) -> asyncio.Task:
        self.dest.bytes_view()[:] = UNTOUCHED
        pull = (transport or self.transport).pull(self.source.kv, KEY, self.source.records, PLACES)
        return asyncio.create_task(pull)

    async def begun(self) -> None:
        await until(lambda: bool((self.dest.bytes_view()[PLACES[0]] != UNTOUCHED).any()), SOON_S)

    def expect_everything(self) -> None:
        assert np.array_equal(self.dest.bytes_view()[PLACES], bytes_of(NUM_BLOCKS, BLOCK_BYTES))

    async def expect_quiet(self) -> None:
        """What has failed writes no more."""
        self.dest.bytes_view()[:] = UNTOUCHED
        await settle()
        assert (self.dest.bytes_view() == UNTOUCHED).all()


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["shm", "tcp", "grpc", "collective"])
async def ends(request, tmp_path_factory):
    name, directory = request.param, str(tmp_path_factory.mktemp("arenas"))
    collective = name == "collective"
    dest = SharedArena(directory, "decode-0", EPOCH, NUM_BLOCKS, BLOCK_BYTES)
    helper = Helper("gloo", "127.0.0.1", directory, restart_s=0.0) if collective else None
    source = await asyncio.to_thread(KillableSource, directory, NUM_BLOCKS, BLOCK_BYTES, "gloo" if collective else "none")
    channels, blocks = Channels(), dest.bytes_view()

    def made(timeout_s: float) -> Transport:
        match name:
            case "shm":
                return ShmTransport(Copier(blocks, digest=True, timeout_s=timeout_s), directory)
            case "tcp":
                return TcpTransport(blocks, digest=True, timeout_s=timeout_s)
            case "grpc":
                return GrpcTransport(blocks, channels, digest=True, timeout_s=timeout_s)
            case _:
                return CollectiveTransport(dest, channels, helper, digest=True, timeout_s=timeout_s)

    made_ends = Ends(source, dest, made(60.0), made(0.5))
    yield made_ends
    for transport in (made_ends.transport, made_ends.brief):
        await transport.close()
    await channels.close()
    if helper is not None:
        await helper.close()
    source.close()
    dest.close()


async def test_a_slow_source_is_waited_for(ends):
    pulling = ends.pull()
    await ends.begun()
    for _ in range(5):
        ends.source.stop()
        await settle()
        ends.source.go_on()
        await settle()
    async with asyncio.timeout(SOON_S):
        await pulling
    ends.expect_everything()


async def test_a_source_that_stands_still_meets_the_deadline(ends):
    """And when it goes on, so does everything."""
    await ends.pull()
    ends.source.stop()
    try:
        pulling = ends.pull(ends.brief)
        async with asyncio.timeout(SOON_S):
            if ends.transport.name == "shm":  # its memory needs nobody's help
                await pulling
                ends.expect_everything()
            else:
                with pytest.raises(TransferError):
                    await pulling
                await ends.expect_quiet()
    finally:
        ends.source.go_on()
    async with asyncio.timeout(2 * SOON_S):
        await ends.pull()
    ends.expect_everything()


async def test_a_pull_that_fails_is_over(ends):
    """Stopped in the middle, given up by the caller: nothing arrives after that, and the next pull is whole."""
    pulling = ends.pull()
    await ends.begun()
    ends.source.stop()
    pulling.cancel()
    await asyncio.wait([pulling], timeout=SOON_S)
    assert pulling.done()
    ends.source.go_on()
    await ends.expect_quiet()
    async with asyncio.timeout(2 * SOON_S):
        await ends.pull()
    ends.expect_everything()


async def test_a_source_that_is_killed_half_way(ends):
    pulling = ends.pull()
    await ends.begun()
    ends.source.stop()
    ends.source.kill()
    try:
        async with asyncio.timeout(SOON_S):
            await pulling
    except TransferError:
        await ends.expect_quiet()
    else:
        ends.expect_everything()
    if ends.transport.name != "shm":
        async with asyncio.timeout(SOON_S):
            with pytest.raises(TransferError):
                await ends.pull()


async def test_another_transport_takes_over_half_way(tmp_path):
    """tcp's server dies in the middle of a block; gRPC of the same process brings the rest, and the metric says so."""
    directory = str(tmp_path)
    source = await asyncio.to_thread(KillableSource, directory, NUM_BLOCKS, BLOCK_BYTES, "none")
    dest = SharedArena(directory, "decode-0", EPOCH, NUM_BLOCKS, BLOCK_BYTES)
    channels, blocks = Channels(), dest.bytes_view()
    transports = {
        "tcp": TcpTransport(blocks, digest=True, timeout_s=20.0),
        "grpc": GrpcTransport(blocks, channels, digest=True, timeout_s=20.0),
    }
    fetcher = Fetcher(transports, "auto", SystemClock(), host_id="elsewhere")
    blocks[:] = UNTOUCHED
    fetching = asyncio.create_task(fetcher.fetch(source.kv, KEY, source.records, PLACES))
    await until(lambda: bool((blocks[PLACES[0]] != UNTOUCHED).any()), SOON_S)
    await asyncio.to_thread(source.end_tcp)
    result = await fetching
    assert result.transport in ("tcp", "grpc")
    assert np.array_equal(blocks[PLACES], bytes_of(NUM_BLOCKS, BLOCK_BYTES))
    assert fetcher.stats.fallbacks == ({("tcp", "grpc"): 1} if result.transport == "grpc" else {})
    assert fetcher.stats.blocks == {result.transport: NUM_BLOCKS}
    assert (await fetcher.fetch(source.kv, KEY, source.records, PLACES)).transport == "grpc"
    assert fetcher.stats.fallbacks == {("tcp", "grpc"): 1}
    await fetcher.close()
    await channels.close()
    source.close()
    dest.close()
