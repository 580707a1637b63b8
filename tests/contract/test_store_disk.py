"""A store's disk: what memory lost comes back from it, also in the next life, and without it memory goes on serving."""

from __future__ import annotations

from dataclasses import replace

import grpc
import pytest
from store_rig import LAYOUT, bytes_of, keys_of, outcome, store_end, store_spec, worker_end
from transport_suite import until

from kvtransfer.codec import digest_of
from tandem.v1 import kv_pb2

DRAM, DISK = kv_pb2.TIER_DRAM, kv_pb2.TIER_DISK


async def written(store, count):
    tier = store.node.plane.disk.tier
    await until(lambda: len(tier.keys()) >= count)


async def test_what_memory_lost_comes_back_from_disk(tmp_path):
    async with worker_end(tmp_path) as worker, store_end(store_spec(tmp_path, tmp_path / "disk")) as store:
        keys = keys_of("a", 40)
        await store.client.offer(worker, keys)
        await written(store, 40)
        for round_ in range(3):
            await store.client.offer(worker, keys_of(f"fill {round_}", 100))
        await written(store, 340)
        reply = await store.client.hold(keys)
        assert (len(reply.records), reply.promoted) == (40, 40)
        await store.client.drop()
        assert await store.client.read(keys) == {key: bytes_of(key).tobytes() for key in keys}
        tiers = await store.client.stat()
        assert (tiers[DISK].blocks, tiers[DISK].hits) == (340, 40)
        assert (tiers[DRAM].hits, tiers[DRAM].misses) == (40, 40)


async def test_a_restarted_store_serves_whole_blocks_from_its_disk(tmp_path):
    spec = store_spec(tmp_path, tmp_path / "disk")
    keys = keys_of("a", 200)
    async with worker_end(tmp_path) as worker:
        async with store_end(spec) as store:
            await store.client.offer(worker, keys)
        async with store_end(replace(spec, epoch=spec.epoch + 1)) as store:
            assert store.node.record().layout == LAYOUT, "known before anybody asks"
            assert set(store.node.plane.disk.resident()) == set(keys), "closing writes what waits"
            assert await store.client.read(keys) == {key: bytes_of(key).tobytes() for key in keys}


async def test_what_is_held_stays_on_disk_too_when_all_is_evicted(tmp_path):
    spec, [key] = store_spec(tmp_path, tmp_path / "disk"), keys_of("a", 1)
    async with worker_end(tmp_path) as worker:
        async with store_end(spec) as store:
            await store.client.offer(worker, [key])
            await written(store, 1)
            await store.client.hold([key])
            assert (await store.client.stub.Evict(kv_pb2.EvictRequest(all=True), timeout=10)).evicted == 0
            assert (await store.client.offer(worker, [key])).known == 1, "in memory, so nobody writes it a second time"
        async with store_end(replace(spec, epoch=spec.epoch + 1)) as store:
            assert store.node.plane.disk.resident() == [key]


async def test_a_cluster_that_comes_back_with_another_model_is_served(tmp_path, caplog):
    spec, other = store_spec(tmp_path, tmp_path / "disk"), replace(LAYOUT, fingerprint=b"\x07" * 16)
    async with worker_end(tmp_path) as worker, worker_end(tmp_path, name="prefill-1", layout=other) as stranger:
        async with store_end(spec) as store:
            await store.client.offer(worker, keys_of("a", 10))
        async with store_end(spec) as store:
            store.client.layout = other
            assert outcome(await store.client.offer(stranger, keys_of("b", 3))) == (3, 0, 0)
            assert len(await store.client.read(keys_of("b", 3))) == 3
            with pytest.raises(grpc.aio.AioRpcError, match="fingerprint differs"):
                await store.client.offer(worker, keys_of("a", 1))
        async with store_end(spec) as store:
            assert store.node.record().layout == other
            assert outcome(await store.client.offer(worker, keys_of("c", 1))) == (1, 0, 0)
            store.client.layout = LAYOUT
            assert len(await store.client.read(keys_of("a", 10))) == 10, "the first model's blocks are still there"


@pytest.mark.parametrize("text", [b"", b"{}", b"\xff", b'{"fingerprint": "zz"}', b"[1]"])
async def test_a_layout_file_that_is_not_whole_costs_a_warm_start_alone(text, tmp_path):
    spec = store_spec(tmp_path, tmp_path / "disk")
    async with worker_end(tmp_path) as worker:
        async with store_end(spec) as store:
            await store.client.offer(worker, keys_of("a", 10))
        (tmp_path / "disk" / "store-0" / "layout.json").write_bytes(text)
        async with store_end(spec) as store:
            assert store.node.plane is None
            await store.client.offer(worker, keys_of("b", 1))
            assert len(await store.client.read(keys_of("a", 10))) == 10


async def test_a_disk_that_cannot_be_had_is_said_once_and_done_without(tmp_path, caplog):
    (tmp_path / "file").write_text("not a directory")
    async with worker_end(tmp_path) as worker, store_end(store_spec(tmp_path, tmp_path / "file")) as store:
        for name in ("a", "b", "c"):
            assert outcome(await store.client.offer(worker, keys_of(name, 10))) == (10, 0, 0)
        assert len(await store.client.read(keys_of("a", 10))) == 10
        assert "file" in store.node.plane.disk.off
    assert len([r for r in caplog.records if "does without its disk" in r.message]) == 1


async def test_a_disk_that_fails_in_the_middle_leaves_memory_serving(tmp_path, caplog):
    async with worker_end(tmp_path) as worker, store_end(store_spec(tmp_path, tmp_path / "disk")) as store:
        await store.client.offer(worker, keys_of("a", 10))
        await written(store, 10)
        disk = store.node.plane.disk

        def full(*args):
            raise OSError(28, "No space left on device")

        disk.tier._store.begin = full  # the writer thread meets it as a full disk
        await store.client.offer(worker, keys_of("b", 10))
        await until(lambda: disk.off)
        for name in ("c", "d"):
            await store.client.offer(worker, keys_of(name, 10))
        assert "No space" in disk.off
        for name in "abcd":
            assert len(await store.client.read(keys_of(name, 10))) == 10
        assert disk.forgotten == 0
    assert len([r for r in caplog.records if "no longer written" in r.message]) == 1


async def test_a_corrupted_block_on_disk_is_a_miss(tmp_path):
    spec = store_spec(tmp_path, tmp_path / "disk")
    keys = keys_of("a", 20)
    async with worker_end(tmp_path) as worker:
        async with store_end(spec) as store:
            await store.client.offer(worker, keys)
        [segment] = (tmp_path / "disk" / "store-0").glob("*/*.seg*")
        spoiled = bytes_of(keys[4]).tobytes()
        raw = bytearray(segment.read_bytes())
        raw[raw.index(spoiled) + 10] ^= 1
        segment.write_bytes(raw)
        async with store_end(replace(spec, epoch=spec.epoch + 1)) as store:
            got = await store.client.read(keys)
            assert got == {key: bytes_of(key).tobytes() for key in keys if key != keys[4]}
            assert (await store.client.stub.Stat(kv_pb2.StatRequest(), timeout=10)).digest_failures == 1


async def test_a_block_that_rots_before_it_is_written_never_reaches_the_disk(tmp_path):
    async with worker_end(tmp_path) as worker, store_end(store_spec(tmp_path, tmp_path / "disk")) as store:
        await store.client.offer(worker, keys_of("a", 2))
        plane, [good, bad] = store.node.plane, keys_of("b", 2)
        blocks = plane.inventory.allocate(2)
        for block, key in zip(blocks, (good, bad), strict=True):
            plane.arena.bytes_view()[block] = bytes_of(key)
            plane.inventory.commit(block, key, digest_of(bytes_of(key)))
        plane.arena.bytes_view()[blocks[1], 3] ^= 1
        plane.inventory.release(blocks)
        plane.disk.accepted([good, bad])
        assert await plane.disk.flush()
        assert plane.disk.contains([good, bad]) == [True, False]
        assert set(await store.client.read([good, bad])) == {good}
        assert (await store.client.stub.Stat(kv_pb2.StatRequest(), timeout=10)).digest_failures == 1


async def test_what_comes_up_is_charged_to_whom_it_was_offered_for_and_weighed_as_then(tmp_path):
    spec = store_spec(tmp_path, tmp_path / "disk", store__tenant_share=0.5, store__policy="cost")
    mine, ours = keys_of("mine", 8), keys_of("ours", 8)

    def kept(store):
        found = {entry.key: (entry.tenant, entry.cost_s) for entry in store.node.plane.inventory.entries()}
        return [found.get(key) for key in mine + ours]

    async with worker_end(tmp_path) as worker:
        async with store_end(spec) as store:
            await store.client.offer(worker, mine, tenant=b"acme", cost_s=0.25)
            await store.client.offer(worker, ours, cost_s=0.5)
            await written(store, 16)
            assert await store.node.plane.node.evict(None) == 16, "out of memory, still on disk"
            assert (await store.client.hold(mine + ours)).promoted == 16
            assert kept(store) == [(b"acme", 0.25)] * 8 + [(b"", 0.5)] * 8
            assert store.node.plane.inventory.tenants() == {b"acme": 8, b"": 8}
            await store.client.drop()
        async with store_end(replace(spec, epoch=spec.epoch + 1)) as store:
            assert (await store.client.hold(mine + ours)).promoted == 16
            assert kept(store) == [(b"acme", 0.25)] * 8 + [(b"", 0.5)] * 8
            await store.client.drop()


async def test_bringing_up_what_is_beyond_a_tenants_share_pushes_out_its_own(tmp_path):
    spec = store_spec(tmp_path, tmp_path / "disk", store__tenant_share=0.5)
    async with worker_end(tmp_path) as worker, store_end(spec) as store:
        total = int(spec.config.store.dram_bytes) // LAYOUT.block_bytes
        greedy, others = keys_of("greedy", total), keys_of("others", total // 2)
        for start in range(0, total, 32):
            await store.client.offer(worker, greedy[start : start + 32], tenant=b"greedy")
        await written(store, total)
        await store.client.offer(worker, others, tenant=b"other")
        assert store.node.plane.inventory.tenants() == {b"greedy": total // 2, b"other": total // 2}
        for _ in range(3):
            assert await store.client.read(greedy[: total // 2])
            assert await store.client.read(greedy[total // 2 :])
        there = {entry.key for entry in store.node.plane.inventory.entries()}
        assert there >= set(others), "whoever is within its share loses nothing to what another brings up"
