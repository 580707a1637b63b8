"""Finished blocks reach a store by themselves; one that is away, of another model or restarted costs nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from store_rig import LAYOUT, STORE_EPOCH, Store, Worker, bytes_of, keys_of, store_end, store_spec, worker_end
from worker_harness import until

from core.blocks import KvSource
from core.request import WorkerRole
from kvtransfer import offerer as offerer_module
from kvtransfer.channels import Channels
from kvtransfer.directory import NodeRecord
from kvtransfer.offerer import Offerer
from kvtransfer.store_choice import choose_store

KEYS = keys_of("a", 40)


@asynccontextmanager
async def offering(worker: Worker) -> AsyncIterator[Offerer]:
    channels = Channels()
    offerer = Offerer(worker.exports, worker.inventory, channels, worker.layout, lambda: worker.source, lambda: 0.25)
    task = asyncio.create_task(offerer.run())
    yield offerer
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled(), task.exception()
    await channels.close()
    assert not worker.inventory.leases_open(), "what was offered is let go"
    assert not worker.inventory.counts().active


def nodes(*stores: Store) -> list[NodeRecord]:
    return [store.node.record() for store in stores]


async def has(store: Store, keys) -> bool:
    """Whether all of `keys` can be read there."""
    found = await store.client.read(keys)
    assert all(found[key] == bytes_of(key).tobytes() for key in found), "a wrong byte"
    return len(found) == len(keys)


async def test_what_became_resident_reaches_the_store(tmp_path):
    async with (
        worker_end(tmp_path) as worker,
        store_end(store_spec(tmp_path)) as store,
        offering(worker) as offerer,
    ):
        assert offerer.met(nodes(store)), "a store nobody knew"
        worker.compute(KEYS)
        offerer.offer(KEYS)
        await until(lambda: not len(offerer))
        assert await has(store, KEYS)
        assert offerer.stats.taken == 40
        assert not offerer.met(nodes(store))


async def test_what_was_computed_again_is_offered_again(tmp_path):
    """The store may have evicted it as well; when it has not, it says so."""
    async with worker_end(tmp_path) as worker, store_end(store_spec(tmp_path)) as store, offering(worker) as offerer:
        offerer.met(nodes(store))
        worker.compute(KEYS[:4])
        offerer.offer(KEYS[:4])
        await until(lambda: offerer.stats.taken == 4)
        assert await store.node.evict(KEYS[:2]) == 2
        offerer.offer(KEYS[:4])
        await until(lambda: not len(offerer))
        assert (offerer.stats.taken, offerer.stats.known) == (6, 2)


async def test_blocks_of_each_tenant_are_charged_to_it_with_what_they_cost(tmp_path):
    async with (
        worker_end(tmp_path) as worker,
        store_end(store_spec(tmp_path, store__policy="cost")) as store,
        offering(worker) as offerer,
    ):
        blocks = worker.inventory.allocate(6)
        for n, (block, key) in enumerate(zip(blocks, KEYS, strict=False)):
            worker.arena.bytes_view()[block] = bytes_of(key)
            worker.inventory.commit(block, key, tenant=b"odd" if n % 2 else b"even")
        worker.inventory.release(blocks)
        offerer.met(nodes(store))
        offerer.offer(KEYS[:6])
        await until(lambda: offerer.stats.taken == 6)
        plane = store.node.plane
        assert plane is not None
        kept = {entry.key: (entry.tenant, entry.cost_s) for entry in plane.inventory.entries()}
        assert kept == {key: (b"odd" if n % 2 else b"even", 0.25) for n, key in enumerate(KEYS[:6])}


async def test_what_was_evicted_before_its_turn_is_passed_over(tmp_path):
    async with worker_end(tmp_path) as worker, store_end(store_spec(tmp_path)) as store, offering(worker) as offerer:
        worker.compute(KEYS[:4])
        worker.inventory.evict(KEYS[1:3])
        offerer.met(nodes(store))
        offerer.offer(KEYS[:4])
        await until(lambda: not len(offerer))
        assert (offerer.stats.taken, offerer.stats.gone) == (2, 2)


async def test_without_a_store_nothing_is_kept_waiting(tmp_path):
    async with worker_end(tmp_path) as worker, offering(worker) as offerer:
        offerer.offer(KEYS)
        assert not len(offerer)
        assert not offerer.met([])


async def test_only_so_much_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(offerer_module, "QUEUE_MAX", 10)
    monkeypatch.setattr(offerer_module, "SKIPPED_MAX", 3)
    async with worker_end(tmp_path) as worker, store_end(store_spec(tmp_path)) as store, offering(worker) as offerer:
        worker.compute(KEYS)
        offerer.met(nodes(store))
        offerer.offer(KEYS)
        assert (len(offerer), offerer.stats.forgotten) == (10, 30)
        await until(lambda: not len(offerer))
        assert await has(store, KEYS[30:]), "the oldest were forgotten"
        assert not await store.client.read(KEYS[:30])
        offerer.skip(KEYS[30:])
        offerer.offer(KEYS[30:])
        assert len(offerer) == 7, "what is to be skipped is bounded too"


async def test_a_store_that_was_away_gets_what_waited(tmp_path, monkeypatch):
    monkeypatch.setattr(offerer_module, "PAUSE_MAX_S", 0.3)
    async with worker_end(tmp_path) as worker, offering(worker) as offerer:
        async with store_end(store_spec(tmp_path)) as store:
            offerer.met(nodes(store))
        worker.compute(KEYS)
        offerer.offer(KEYS)
        await until(lambda: offerer.stats.failures >= 2)
        assert len(offerer) == len(KEYS)
        young = replace(store_spec(tmp_path), epoch=STORE_EPOCH + 1)
        async with store_end(young) as store:
            assert offerer.met(nodes(store)), "another life, which knows nothing"
            await until(lambda: not len(offerer))
            assert offerer.stats.taken == len(KEYS)


async def test_a_store_of_another_model_is_left_alone(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(offerer_module, "PAUSE_MIN_S", 0.01)
    other = replace(LAYOUT, fingerprint=b"\x02" * 16)
    async with (
        worker_end(tmp_path) as worker,
        worker_end(tmp_path, layout=other, name="prefill-1") as stranger,
        store_end(store_spec(tmp_path)) as store,
        offering(worker) as offerer,
    ):
        await store.client.offer(stranger, keys_of("b", 2))
        offerer.met(nodes(store))
        worker.compute(KEYS[:3])
        offerer.offer(KEYS[:3])
        await until(lambda: offerer.stats.refused == 3)
        assert "fingerprint differs" in caplog.text


async def test_blocks_that_others_offer_are_skipped(tmp_path):
    async with worker_end(tmp_path) as worker, store_end(store_spec(tmp_path)) as store, offering(worker) as offerer:
        worker.compute(KEYS[:6])
        offerer.met(nodes(store))
        offerer.skip(KEYS[:4])
        offerer.offer(KEYS[:6])
        assert len(offerer) == 2
        await until(lambda: offerer.stats.taken == 2)
        offerer.offer(KEYS[:4])
        assert len(offerer) == 4, "this once"


def store(name, host):
    return KvSource(name, 1, "127.0.0.1:1", host)


def test_the_store_of_the_same_host_is_chosen():
    here = store("prefill-0", "h2")
    assert choose_store([store("a", "h1"), store("b", "h2"), store("c", "h3")], here) == store("b", "h2")
    assert choose_store([], here) is None


def test_without_one_workers_spread_over_the_others_and_stay_where_they_are():
    stores = [store(name, f"h{n}") for n, name in enumerate("abcd")]
    chosen = {n: choose_store(stores, store(f"prefill-{n}", "elsewhere")) for n in range(200)}
    counts = [sum(one == each for one in chosen.values()) for each in stores]
    assert min(counts) > 25
    fewer = stores[:3]
    moved = [n for n, one in chosen.items() if choose_store(fewer, store(f"prefill-{n}", "elsewhere")) != one]
    assert moved == [n for n, one in chosen.items() if one == stores[3]], "only those of the store that went"


@pytest.mark.parametrize("role", [WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.COLOCATED])
async def test_workers_are_no_stores(role, tmp_path):
    async with worker_end(tmp_path) as worker, offering(worker) as offerer:
        assert not offerer.met([NodeRecord(store("prefill-1", worker.source.host_id), LAYOUT, role)])
