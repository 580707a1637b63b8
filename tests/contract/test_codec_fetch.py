"""Fetches and whole hand-offs through codecs: what is chosen, what is counted, and under which keys blocks end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import numpy as np
import pytest
from handoff_pair import LAYOUT, Destination, Source, destination_end, source_end
from transport_suite import until

from core.blocks import KvTicket, block_keys, root_key
from core.config import TransferConfig
from core.request import AttemptKey
from kvtransfer.codecs import make_codec
from kvtransfer.link_codecs import PULL_BYTES_MIN
from kvtransfer.plane import offered, open_tcp
from kvtransfer.puller import IngestPlan
from kvtransfer.transport import PullResult

KEY = AttemptKey("request", 1)
TOKENS = list(range(1000, 1075))  # four full blocks and one of 11 tokens
SALTED = block_keys(root_key(LAYOUT.fingerprint, codec="int8"), TOKENS, LAYOUT.block_size)
Ends = tuple[Source, KvTicket, Destination]


@asynccontextmanager
async def both_ends(transport: str, codec: str, **config: object) -> AsyncIterator[Ends]:
    """A source that proposes `codec` and has announced and closed the whole request, and a destination configured alike."""
    settings = {"transport": transport, "codec": codec, **config}
    async with source_end() as source, destination_end(**settings) as destination:
        tcp = open_tcp(TransferConfig(transport="tcp"), source.exports, "127.0.0.1:0")
        assert tcp is not None
        ticket = source.open(KEY)
        place = replace(ticket.source, transports=offered(source.arena, tcp.address), tcp_address=tcp.address)
        source.announce(KEY, TOKENS, 0, 4)
        source.close(KEY, TOKENS)
        yield source, replace(ticket, source=place, codec=codec), destination
        await asyncio.to_thread(tcp.close)


def lossy_plan(destination: Destination) -> IngestPlan:
    return replace(destination.plan(TOKENS), lossy="int8", salted_keys=SALTED)


@pytest.fixture(params=["tcp", "grpc"])
def link(request) -> str:
    return request.param


async def test_a_hand_off_through_planes_is_exact(link):
    async with both_ends(link, "planes") as (_, ticket, destination):
        plan = destination.plan(TOKENS)
        result = await destination.puller.pull(ticket, plan)
        destination.expect(plan, TOKENS)
        assert (result.codec, plan.salted) == ("", set())
        assert destination.fetcher.stats.encoded_blocks == {(link, "planes"): 5}


async def test_a_hand_off_through_int8_is_committed_under_salted_keys(link):
    async with both_ends(link, "int8") as (source, ticket, destination):
        plan = lossy_plan(destination)
        result = await destination.puller.pull(ticket, plan)
        assert (result.codec, plan.salted) == ("int8", {0, 1, 2, 3, 4})
        assert not destination.inventory.match(plan.keys)
        assert [destination.inventory.key_of(block) for block in plan.blocks] == [*SALTED, None]
        assert not any(destination.inventory.digest(block) for block in plan.blocks), "another block's digest"
        made, out = make_codec("int8", LAYOUT), np.empty(LAYOUT.block_bytes, np.uint8)
        for block, key in zip(plan.blocks, plan.keys, strict=False):
            (original,) = source.inventory.match([key])
            made.decode(made.encode(source.arena.bytes_view()[original]), out)
            assert np.array_equal(destination.arena.bytes_view()[block], out)
        destination.expect_all_free(plan)


async def test_exact_and_salted_blocks_found_here_stay_what_they_are(link):
    async with both_ends(link, "int8") as (_, ticket, destination):
        keys = block_keys(root_key(LAYOUT.fingerprint), TOKENS, LAYOUT.block_size)
        inventory = destination.inventory
        blocks = inventory.allocate(5)
        inventory.commit(blocks[0], keys[0])
        inventory.commit(blocks[1], SALTED[1])
        plan = IngestPlan(keys, len(TOKENS), blocks, frozenset({0, 1}), "int8", SALTED, {1})
        result = await destination.puller.pull(ticket, plan)
        assert (result.codec, plan.salted) == ("int8", {1, 2, 3, 4})
        assert [inventory.key_of(block) for block in plan.blocks] == [keys[0], *SALTED[1:], None]


async def test_a_lossy_ticket_gives_raw_to_a_plan_that_accepts_none(link):
    async with both_ends(link, "int8") as (_, ticket, destination):
        plan = destination.plan(TOKENS)
        assert (await destination.puller.pull(ticket, plan)).codec == ""
        destination.expect(plan, TOKENS)
        assert not destination.fetcher.stats.encoded_blocks


async def test_what_is_held_by_key_keeps_every_bit_whatever_is_configured(link):
    async with both_ends(link, "int8") as (source, ticket, destination):
        records = source.exports.find(KEY, ticket.source.epoch).records
        result = await destination.fetcher.fetch(ticket.source, KEY, records, range(len(records)))
        assert result.codec in ("raw", "planes")
        sent = source.arena.bytes_view()[[record.block_id for record in records]]
        assert np.array_equal(destination.arena.bytes_view()[: len(records)], sent)


@pytest.mark.parametrize("codec", ["planes", "int8"])
async def test_damaged_encodings_are_asked_for_again_raw(link, codec):
    async with both_ends(link, codec) as (source, ticket, destination):
        damaged = source.exports.codecs.find(codec)
        source.exports.codecs._made[codec] = CutShort(damaged)
        plan = lossy_plan(destination) if codec == "int8" else destination.plan(TOKENS)
        result = await destination.puller.pull(ticket, plan)
        stats = destination.fetcher.stats
        assert (result.codec, result.transport, plan.salted) == ("", link, set())
        assert stats.damaged[codec] >= 1
        assert not stats.fallbacks, "the link is not to blame"
        assert not stats.encoded_blocks
        destination.expect(plan, TOKENS)


class CutShort:
    def __init__(self, codec) -> None:
        self._codec = codec
        self.name, self.lossy, self.encoded_bytes_max = codec.name, codec.lossy, codec.encoded_bytes_max

    def encode(self, block: np.ndarray) -> np.ndarray:
        return self._codec.encode(block)[:-1]


async def test_auto_measures_and_then_encodes_where_the_link_is_slow(link):
    async with both_ends(link, "auto") as (source, ticket, destination):
        fetcher, chooser = destination.fetcher, destination.fetcher._codecs
        records = source.exports.find(KEY, ticket.source.epoch).records
        first = await fetcher.fetch(ticket.source, KEY, records, range(5), "auto")
        assert first.codec == "raw", "nothing is known yet"
        await until(lambda: chooser.costs)
        assert [cost.name for cost in chooser.costs] == ["raw", "planes"]
        chooser._links.costs = [chooser.costs[0], replace(chooser.costs[1], ratio=0.5)]  # as if they were not random bytes
        slow = PullResult(PULL_BYTES_MIN, PULL_BYTES_MIN / 1e3)
        chooser.observe(ticket.source, link, "auto", slow, [])
        second = await fetcher.fetch(ticket.source, KEY, records, range(5, 10), "auto")
        assert second.codec == "planes"
        assert np.array_equal(destination.arena.bytes_view()[:5], destination.arena.bytes_view()[5:10])
        assert fetcher.stats.encoded_blocks == {(link, "planes"): 5}
        assert fetcher.stats.encoded_bytes[link, "planes"] == second.wire_bytes > 0
