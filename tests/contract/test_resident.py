"""Blocks are made resident from whoever has them; whatever goes wrong is a shorter prefix and never a wrong byte."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from kv_peers import KEYS, LAYOUT, directory, peer, worker
from worker_harness import until

from core.request import WorkerRole
from kvtransfer import flight as flight_module
from kvtransfer.directory import DirectoryError, Located, Tier
from kvtransfer.local_directory import ClockedDirectory
from kvtransfer.loopback import PROCESS_HUB
from kvtransfer.shm import ShmTransport


@pytest.mark.parametrize("transport", ["loopback", "shm", "tcp", "grpc"])
async def test_blocks_of_another_worker_become_resident(transport, tmp_path):
    there = directory()
    async with peer("prefill-1", there, tmp_path, transport=transport) as other:
        PROCESS_HUB.register("prefill-1", other.exports.epoch, other.arena)
        async with worker(there, tmp_path, transport=transport) as here:
            await other.put(KEYS[:20])
            assert await here.ensure(KEYS[:25]) == 20
            assert here.stats.blocks == {("local", "dram"): 0, ("peer", "dram"): 20}
            assert here.stats.bytes == {("peer", "dram"): 20 * LAYOUT.block_bytes}
            assert here.stats.misses == 5
            assert here.fetcher.stats.blocks == {transport: 20}
            await until(other.settled)
            # once more: everything is here, nobody is asked but for the rest
            asked = other.node.asked
            assert await here.ensure(KEYS[:20]) == 20
            assert other.node.asked == asked
            assert here.stats.blocks["local", "dram"] == 20
        PROCESS_HUB.unregister("prefill-1", other.exports.epoch)


async def test_several_sources_serve_one_prompt(tmp_path):
    there = directory()
    async with (
        peer("prefill-1", there, tmp_path) as one,
        peer("decode-1", there, tmp_path) as two,
        peer("store-0", there, tmp_path, role=WorkerRole.STORE) as store,
        worker(there, tmp_path) as here,
    ):
        await one.put(KEYS[:8])
        await two.put(KEYS[8:12])
        await store.put(KEYS[12:16])
        await store.put(KEYS[16:20], Tier.DISK)
        assert await here.ensure(KEYS[:30]) == 20
        assert here.stats.blocks == {("local", "dram"): 0, ("peer", "dram"): 12, ("store", "dram"): 4, ("store", "disk"): 4}
        assert (one.node.asked, two.node.asked, store.node.asked) == (1, 1, 2)
        for source in (one, two, store):
            await until(source.settled)


async def test_a_gap_in_the_own_cache_is_all_that_is_fetched(tmp_path):
    there = directory()
    async with peer("prefill-1", there, tmp_path) as other, worker(there, tmp_path) as here:
        await other.put(KEYS[:10])
        assert await here.ensure(KEYS[:10]) == 10
        await until(lambda: not here.inventory.counts().active)
        assert here.inventory.evict(KEYS[3:6]) == 3
        before = here.stats.blocks["peer", "dram"]
        assert await here.ensure(KEYS[:10]) == 10
        assert here.stats.blocks["peer", "dram"] - before == 3


async def test_nothing_is_asked_for_what_is_quicker_to_compute(tmp_path):
    there = directory()
    async with peer("prefill-1", there, tmp_path) as other, worker(there, tmp_path) as here:
        await other.put(KEYS[:10])
        here.compute_block_s[0] = 1e-6
        assert not here.resident.worth_asking(KEYS[:10])
        assert await here.ensure(KEYS[:10]) == 0
        assert other.node.asked == 0
        here.compute_block_s[0] = 1.0
        assert here.resident.worth_asking(KEYS[:10])
        assert not here.resident.worth_asking([])


async def test_two_prompts_that_want_the_same_blocks_fetch_them_once(tmp_path):
    there = directory()
    async with peer("prefill-1", there, tmp_path) as other, worker(there, tmp_path) as here:
        await other.put(KEYS[:12])
        other.node.gate = asyncio.Event()
        first = asyncio.create_task(here.ensure(KEYS[:8]))
        await other.node.arrived.wait()
        second = asyncio.create_task(here.ensure(KEYS[:12]))
        third = asyncio.create_task(here.ensure(KEYS[2:4]))
        await until(lambda: other.node.asked == 2)
        other.node.gate.set()
        assert await asyncio.gather(first, second, third) == [8, 12, 2]
        assert here.stats.blocks["peer", "dram"] == 12
        assert here.stats.bytes["peer", "dram"] == 12 * LAYOUT.block_bytes


async def test_a_prompt_that_is_cancelled_leaves_the_fetch_to_the_one_that_still_waits(tmp_path):
    there = directory()
    async with peer("prefill-1", there, tmp_path) as other, worker(there, tmp_path) as here:
        await other.put(KEYS[:8])
        other.node.gate = asyncio.Event()
        first = asyncio.create_task(here.ensure(KEYS[:8]))
        await other.node.arrived.wait()
        second = asyncio.create_task(here.ensure(KEYS[:8]))
        await until(lambda: here.stats.asked == 2)
        first.cancel()
        await asyncio.wait([first])
        other.node.gate.set()
        assert first.cancelled()
        assert await second == 8
        assert other.node.asked == 1


async def test_a_cancelled_prompt_holds_nothing_anywhere(tmp_path):
    there = directory()
    async with peer("prefill-1", there, tmp_path) as other, worker(there, tmp_path) as here:
        await other.put(KEYS[:8])
        other.node.gate = asyncio.Event()
        task = asyncio.create_task(here.ensure(KEYS[:8]))
        await other.node.arrived.wait()
        task.cancel()
        await asyncio.wait([task])
        await until(lambda: not here.inventory.counts().active)
        other.node.gate.set()
        await until(other.settled)
        await until(lambda: not here.resident._flights)  # who joins one that is being given up gets nothing
        other.node.gate = None
        assert await here.ensure(KEYS[:8]) == 8, "nothing is stuck behind the cancelled one"


async def test_a_stale_entry_costs_a_miss(tmp_path):
    there = directory()
    async with peer("prefill-1", there, tmp_path) as other, worker(there, tmp_path) as here:
        await other.put(KEYS[:4])
        await other.say(KEYS[:10])
        assert await here.ensure(KEYS[:10]) == 4
        assert other.node.asked == 1
        await until(other.settled)


async def test_what_one_node_lost_comes_from_another(tmp_path):
    there = directory()
    async with (
        peer("prefill-1", there, tmp_path) as liar,
        peer("prefill-2", there, tmp_path) as other,
        worker(there, tmp_path) as here,
    ):
        await liar.put(KEYS[:3])
        await liar.say(KEYS[:10])
        await other.put(KEYS[3:8])
        assert await here.ensure(KEYS[:10]) == 8
        assert (liar.node.asked, other.node.asked) == (1, 1)


async def test_a_node_that_is_gone_costs_its_part(tmp_path):
    there = directory()
    async with worker(there, tmp_path) as here, peer("prefill-2", there, tmp_path) as other:
        async with peer("prefill-1", there, tmp_path) as dead:
            await dead.put(KEYS[:6])
        await other.put(KEYS[3:9])
        assert await here.ensure(KEYS[:9]) == 0, "its first blocks are nowhere"
        assert sum(here.stats.failures.values()) == 1
        await other.put(KEYS[:3])
        assert await here.ensure(KEYS[:9]) == 9


async def test_a_source_that_dies_half_way_is_replaced(tmp_path, monkeypatch):
    """Two slices have arrived when it dies; the rest comes from the other holder."""
    monkeypatch.setattr(flight_module, "SLICE_BYTES", 2 * LAYOUT.block_bytes)
    there = directory()
    async with (
        worker(there, tmp_path, transport="grpc") as here,
        peer("z", there, tmp_path, transport="grpc") as other,
        peer("a", there, tmp_path, transport="grpc") as dying,
    ):
        await dying.put(KEYS[:8])
        await other.put(KEYS[4:8])
        pull = here.fetcher.transports["grpc"].pull

        async def interrupted(source, key, records, *rest):
            if source.worker_id == "a" and records[0].index >= 4:
                dying.exports.drop(key)
            return await pull(source, key, records, *rest)

        monkeypatch.setattr(here.fetcher.transports["grpc"], "pull", interrupted)
        assert await here.ensure(KEYS[:8]) == 8
        assert here.stats.failures == {"lease_expired": 1}
        assert (dying.node.asked, other.node.asked) == (1, 1)


async def test_a_wrong_digest_is_counted_and_its_blocks_are_recomputed(tmp_path):
    there = directory()
    async with peer("prefill-1", there, tmp_path) as bad, worker(there, tmp_path) as here:
        blocks = await bad.put(KEYS[:6])
        for block, digest in zip(blocks, range(1, 7), strict=True):
            bad.inventory.set_digest(block, digest)
        assert await here.ensure(KEYS[:6]) == 0
        assert here.stats.failures == {"digest_mismatch": 1}
        assert here.fetcher.stats.digest_failures == 2, "over shm and over its replacement"
        assert here.inventory.counts().cached == 0, "nothing of it is findable"
        await until(lambda: bad.node.counts.digest_failures == 6)
        await until(lambda: bad.node.sweep() or not bad.node.entries())  # where they were they are dropped, too
        async with peer("prefill-2", there, tmp_path) as good:
            await good.put(KEYS[:6])
            assert await here.ensure(KEYS[:6]) == 6


async def test_a_corrupted_slice_costs_nothing_but_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(flight_module, "SLICE_BYTES", 2 * LAYOUT.block_bytes)
    there = directory()
    async with (
        peer("prefill-1", there, tmp_path) as bad,
        peer("store-0", there, tmp_path, role=WorkerRole.STORE) as store,
        worker(there, tmp_path) as here,
    ):
        blocks = await bad.put(KEYS[:8])
        bad.inventory.set_digest(blocks[3], 99)
        await store.put(KEYS[2:4], Tier.DISK)
        assert await here.ensure(KEYS[:8]) == 8
        assert here.stats.blocks == {("local", "dram"): 0, ("peer", "dram"): 6, ("store", "disk"): 2}


async def test_nodes_of_another_model_are_not_asked(tmp_path):
    there = directory()
    other_model = replace(LAYOUT, fingerprint=b"\x02" * 16)
    async with peer("prefill-1", there, tmp_path, layout=other_model) as other, worker(there, tmp_path) as here:
        await other.say(KEYS[:6])
        assert await here.ensure(KEYS[:6]) == 0
        assert other.node.asked == 0


async def test_a_node_that_restarted_is_met_anew(tmp_path):
    there = directory()
    async with worker(there, tmp_path) as here:
        async with peer("prefill-1", there, tmp_path) as old:
            await old.put(KEYS[:4])
            assert await here.ensure(KEYS[:4]) == 4
        async with peer("prefill-1", there, tmp_path, epoch=9) as new:
            await new.put(KEYS[4:9])
            assert await here.ensure(KEYS[:9]) == 9
            transport = here.fetcher.transports["shm"]
            assert isinstance(transport, ShmTransport)
            assert [epoch for _, epoch in transport._mapped] == [9], "the old incarnation's memory is not kept"


class AwayDirectory(ClockedDirectory):
    def __init__(self, hangs: bool) -> None:
        self.hangs = hangs

    async def locate(self, keys) -> Located:
        if self.hangs:
            await asyncio.Event().wait()
        raise DirectoryError("the directory is away")


async def test_without_the_directory_everything_is_computed(tmp_path):
    async with worker(AwayDirectory(hangs=False), tmp_path) as here:
        assert await here.ensure(KEYS[:6]) == 0
        assert here.stats.directory_failures == 1


async def test_nothing_waits_longer_than_the_deadline(tmp_path):
    there = directory()
    async with worker(AwayDirectory(hangs=True), tmp_path) as here:
        assert await asyncio.wait_for(here.ensure(KEYS[:6], deadline_s=0.05), 5) == 0
        assert here.stats.timeouts == 1
    async with (
        peer("a", there, tmp_path) as stuck,
        peer("b", there, tmp_path) as quick,
        worker(there, tmp_path) as here,
    ):
        await quick.put(KEYS[:4])
        await stuck.put(KEYS[4:8])
        stuck.node.gate = asyncio.Event()
        ensuring = asyncio.create_task(here.ensure(KEYS[:8], deadline_s=1.0))
        await until(lambda: here.stats.blocks["peer", "dram"] == 4)
        assert await ensuring == 4, "what has landed is used"
        stuck.node.gate.set()
        await until(stuck.settled)


async def test_short_of_memory_a_shorter_prefix_is_fetched(tmp_path):
    there = directory()
    async with peer("prefill-1", there, tmp_path) as other, worker(there, tmp_path, num_blocks=32) as here:
        await other.put(KEYS[:40])
        busy = here.inventory.allocate(20)
        assert await here.ensure(KEYS[:40]) == 10, "of twelve that are free two stay for streams in progress"
        assert here.stats.short_of_memory >= 1
        here.inventory.release(busy)
        assert await here.ensure(KEYS[:40]) == 30


async def test_many_keys_are_asked_for_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(flight_module, "HOLD_KEYS_MAX", 7)
    there = directory()
    async with peer("prefill-1", there, tmp_path) as other, worker(there, tmp_path) as here:
        await other.put(KEYS[:20])
        assert await here.ensure(KEYS[:20]) == 20
        assert other.node.asked == 3


async def test_closing_ends_what_is_under_way(tmp_path):
    there = directory()
    async with peer("prefill-1", there, tmp_path) as other:
        async with worker(there, tmp_path) as here:
            await other.put(KEYS[:8])
            other.node.gate = asyncio.Event()
            waiting = asyncio.create_task(here.ensure(KEYS[:8]))
            await other.node.arrived.wait()
            await here.resident.close()
            assert await waiting == 0
        other.node.gate.set()
        await until(other.settled)
