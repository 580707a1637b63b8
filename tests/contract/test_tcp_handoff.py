"""Whole hand-offs over tcp, and what happens to them when it fails on the way."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from handoff_pair import Source, destination_end, source_end
from transport_suite import until

from core.blocks import KvTicket
from core.config import TransferConfig
from core.request import AttemptKey
from kvtransfer.plane import offered, open_tcp
from kvtransfer.tcp_server import TcpServer

KEY = AttemptKey("request", 1)
TOKENS = list(range(1000, 1075))  # four full blocks and one of 11 tokens


@asynccontextmanager
async def tcp_source() -> AsyncIterator[tuple[Source, TcpServer]]:
    async with source_end() as source:
        server = open_tcp(TransferConfig(), source.exports, "127.0.0.1:0")
        assert server is not None
        yield source, server
        await asyncio.to_thread(server.close)


def opened(source: Source, server: TcpServer) -> KvTicket:
    ticket = source.open(KEY)
    reachable = replace(ticket.source, transports=offered(source.arena, server.address), tcp_address=server.address)
    return replace(ticket, source=reachable)


async def test_a_hand_off_between_hosts_goes_over_tcp():
    async with tcp_source() as (source, server), destination_end() as destination:
        ticket, plan = opened(source, server), destination.plan(TOKENS)
        pulling = asyncio.create_task(destination.puller.pull(ticket, plan))
        await until(lambda: len(server._connections) == 1)  # dialled before the first block is announced
        source.announce(KEY, TOKENS, 0, 4)
        source.close(KEY, TOKENS)
        result = await pulling
        assert result.transport == "tcp"
        assert destination.fetcher.stats.blocks == {"tcp": 5}
        assert not destination.fetcher.stats.fallbacks
        destination.expect(plan, TOKENS)


@pytest.mark.parametrize("blocks_before", [0, 2])
async def test_grpc_takes_over_in_mid_flight_and_the_metric_says_so(blocks_before):
    async with tcp_source() as (source, server), destination_end() as destination:
        ticket, plan = opened(source, server), destination.plan(TOKENS)
        if blocks_before:
            source.announce(KEY, TOKENS, 0, blocks_before)
        pulling = asyncio.create_task(destination.puller.pull(ticket, plan))
        await until(lambda: destination.fetcher.stats.blocks["tcp"] == blocks_before and server._connections)
        await asyncio.to_thread(server.close)
        source.announce(KEY, TOKENS, blocks_before, 4)
        source.close(KEY, TOKENS)
        assert (await pulling).transport == "grpc"
        stats = destination.fetcher.stats
        assert stats.fallbacks == {("tcp", "grpc"): 1}
        assert (stats.blocks["tcp"], stats.blocks["grpc"]) == (blocks_before, 5 - blocks_before)
        destination.expect(plan, TOKENS)


async def test_a_block_lost_on_the_way_is_read_again_over_tcp():
    async with tcp_source() as (source, server), destination_end() as destination:
        ticket, plan = opened(source, server), destination.plan(TOKENS)
        (lost,) = source.compute(KEY, TOKENS, 0, 1)
        source.exports.announce(KEY, [replace(lost, generation=lost.generation - 1, digest=5)])
        source.announce(KEY, TOKENS, 1, 3)
        pulling = asyncio.create_task(destination.puller.pull(ticket, plan))
        await until(lambda: destination.fetcher.stats.blocks["tcp"] == 2)
        source.announce(KEY, TOKENS, 0, 1)
        source.announce(KEY, TOKENS, 3, 4)
        source.close(KEY, TOKENS)
        await pulling
        destination.expect(plan, TOKENS)
        assert destination.fetcher.stats.blocks == {"tcp": 5}


async def test_a_cancelled_hand_off_ends_the_export():
    async with tcp_source() as (source, server), destination_end() as destination:
        ticket, plan = opened(source, server), destination.plan(TOKENS)
        source.announce(KEY, TOKENS, 0, 2)
        pulling = asyncio.create_task(destination.puller.pull(ticket, plan))
        await until(lambda: destination.fetcher.stats.blocks["tcp"] == 2)
        pulling.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await pulling
        destination.expect_all_free(plan)
        await until(lambda: not len(source.exports))


@pytest.mark.parametrize(("transport", "served"), [("auto", True), ("tcp", True), ("shm", False), ("grpc", False)])
async def test_it_listens_only_where_the_transport_may_want_it(transport, served):
    async with source_end() as source:
        server = open_tcp(TransferConfig(transport=transport), source.exports, "127.0.0.1:0")
        assert (server is not None) == served
        if server is not None:
            assert server.address == f"127.0.0.1:{server.port}"
            server.close()


async def test_every_interface_is_advertised_by_the_workers_own_address():
    async with source_end() as source:
        config = TransferConfig.model_validate({"tcp": {"bind": "0.0.0.0:0"}})
        server = open_tcp(config, source.exports, "127.0.0.2:0")
        assert server is not None
        assert server.address == f"127.0.0.2:{server.port}"
        server.close()
