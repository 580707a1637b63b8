"""Hot blocks get a copy on the host that keeps fetching them, and lose it when they are cold and somebody else has them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from store_rig import LAYOUT, bytes_of, keys_of, outcome, store_end, store_spec, worker_end

from core.blocks import KvSource
from core.clock import ManualClock, SystemClock
from core.request import AttemptKey, WorkerRole
from kvtransfer.arena import host_id
from kvtransfer.directory import DirectoryError, NodeRecord, Tier
from kvtransfer.local_directory import ClockedDirectory, LocalDirectory
from kvtransfer.store_replicas import Replicas

HITS = 3
READER = "decode-7"


class Hosts:
    """Two hosts, as their shared memory tells: a store on each, and a reader on the second."""

    def __init__(self, first, second, directory, clock, folders) -> None:
        self.first, self.second, self.directory, self.clock = first, second, directory, clock
        ids = [host_id(str(folder)) for folder in folders]
        self.at_first, self.at_second = (
            Replicas(end.node, directory, HITS, 60.0, clock, here) for end, here in zip((first, second), ids, strict=True)
        )
        self.reader = NodeRecord(KvSource(READER, 1, "127.0.0.1:1", ids[1]), LAYOUT, WorkerRole.DECODE)
        self.reads = 0

    async def join(self) -> None:
        for record in (self.first.node.record(), self.second.node.record(), self.reader):
            await self.directory.join(record, 1e6)

    async def read(self, end, keys, times=1) -> None:
        for _ in range(times):
            self.reads += 1
            assert len(await end.client.read(keys, AttemptKey(f"hold/{READER}/1.{self.reads}", 1))) == len(keys)


@pytest.fixture
async def hosts(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    directory, clock = ClockedDirectory(LocalDirectory(), SystemClock()), ManualClock(1000.0)
    async with (
        worker_end(folders[0]) as worker,
        store_end(store_spec(folders[0])) as first,
        store_end(replace(store_spec(folders[1]), worker_id="store-1")) as second,
    ):
        town = Hosts(first, second, directory, clock, folders)
        town.worker = worker
        await town.join()
        yield town
        await town.at_first.close()
        await town.at_second.close()


async def test_what_a_host_keeps_fetching_is_copied_there_and_given_up_when_cold(hosts):
    hot, cold = keys_of("hot", 6), keys_of("cold", 4)
    assert outcome(await hosts.first.client.offer(hosts.worker, hot + cold)) == (10, 0, 0)
    await hosts.join()
    await hosts.at_first.turn()  # learns who is where
    await hosts.read(hosts.first, hot, HITS - 1)
    await hosts.read(hosts.first, cold)
    await hosts.at_first.turn()
    assert hosts.at_first.made == 0
    await hosts.read(hosts.first, hot)
    await hosts.at_first.turn()
    assert hosts.at_first.made == 6
    assert await hosts.second.client.read(hot) == {key: bytes_of(key).tobytes() for key in hot}
    assert not (await hosts.second.client.hold(cold)).records
    await hosts.at_first.turn()
    assert hosts.at_first.made == 6, "once is enough"

    await hosts.directory.announce("store-0", 9, [(key, Tier.DRAM) for key in hot[:5]], [])
    await hosts.directory.announce("store-1", 9, [(key, Tier.DRAM) for key in hot], [])
    await hosts.read(hosts.second, hot[:2], HITS)
    hosts.clock.advance(400.0)
    await hosts.at_second.turn()
    assert hosts.at_second.given_up == 3
    left = await hosts.second.client.read(hot)
    assert set(left) == {hot[0], hot[1], hot[5]}, "two are used, and of one nobody else has a copy"


async def test_readers_on_the_same_host_and_strangers_make_no_copies(hosts):
    keys = keys_of("near", 4)
    await hosts.first.client.offer(hosts.worker, keys)
    await hosts.join()
    near = replace(hosts.reader, source=replace(hosts.reader.source, worker_id="decode-1", host_id=hosts.at_first._host_id))
    await hosts.directory.join(near, 1e6)
    await hosts.at_first.turn()
    for n in range(2 * HITS):
        await hosts.first.client.read(keys, AttemptKey(f"hold/decode-1/1.{n}", 1))
        await hosts.first.client.read(keys, AttemptKey(f"hold/nobody/1.{n}", 1))
        await hosts.first.client.read(keys, AttemptKey(f"odd name {n}", 1))
    await hosts.at_first.turn()
    assert hosts.at_first.made == 0


async def test_a_host_whose_store_is_gone_gets_none(hosts):
    keys = keys_of("a", 4)
    await hosts.first.client.offer(hosts.worker, keys)
    await hosts.join()
    dead = hosts.second.node.record()
    await hosts.directory.leave("store-1", 9)
    await hosts.directory.join(replace(dead, source=replace(dead.source, epoch=10, grpc_address="127.0.0.1:1")), 1e6)
    await hosts.at_first.turn()
    await hosts.read(hosts.first, keys, HITS)
    await hosts.at_first.turn()
    assert hosts.at_first.made == 0
    assert hosts.first.node.plane.exports.holds_open == 0


async def test_a_copy_is_charged_to_the_tenant_and_weighs_what_the_block_does(hosts):
    mine, ours = keys_of("mine", 3), keys_of("ours", 2)
    await hosts.first.client.offer(hosts.worker, mine, tenant=b"acme", cost_s=0.25)
    await hosts.first.client.offer(hosts.worker, ours, cost_s=0.5)
    await hosts.join()
    await hosts.at_first.turn()
    await hosts.read(hosts.first, mine + ours, HITS)
    await hosts.at_first.turn()
    assert hosts.at_first.made == hosts.at_second.kept == 5
    there = {entry.key: (entry.tenant, entry.cost_s) for entry in hosts.second.node.plane.inventory.entries()}
    assert there == {**dict.fromkeys(mine, (b"acme", 0.25)), **dict.fromkeys(ours, (b"", 0.5))}


async def test_a_cold_copy_that_is_held_or_pinned_has_its_turn_later(hosts):
    held, pinned = keys_of("hot", 2)
    await hosts.first.client.offer(hosts.worker, [held, pinned])
    await hosts.join()
    await hosts.at_first.turn()
    await hosts.read(hosts.first, [held, pinned], HITS)
    await hosts.at_first.turn()
    await hosts.directory.announce("store-0", 9, [(held, Tier.DRAM), (pinned, Tier.DRAM)], [])
    await hosts.second.client.hold([held])
    await hosts.second.node.pin([pinned])
    for given_up in (0, 1, 2):
        hosts.clock.advance(400.0)
        await hosts.at_second.turn()
        assert (hosts.at_second.given_up, hosts.at_second.kept) == (given_up, 2 - given_up)
        if not given_up:
            await hosts.second.client.drop()
        hosts.second.node.unpin([pinned] if given_up else [])


async def test_copies_whose_turn_comes_while_the_directory_fails_have_their_turn_later(hosts, monkeypatch):
    hot = keys_of("hot", 3)
    await hosts.first.client.offer(hosts.worker, hot)
    await hosts.join()
    await hosts.at_first.turn()
    await hosts.read(hosts.first, hot, HITS)
    await hosts.at_first.turn()
    await hosts.directory.announce("store-0", 9, [(key, Tier.DRAM) for key in hot], [])
    locate, asked = hosts.directory.locate, []

    async def locate_but_once(keys):
        asked.append(keys)
        if len(asked) == 2:
            raise DirectoryError("the directory does not answer")
        return await locate(keys)

    monkeypatch.setattr(hosts.directory, "locate", locate_but_once)
    hosts.clock.advance(400.0)
    with pytest.raises(DirectoryError):
        await hosts.at_second.turn()
    assert (hosts.at_second.given_up, hosts.at_second.kept) == (1, 2)
    hosts.clock.advance(400.0)
    await hosts.at_second.turn()
    assert (hosts.at_second.given_up, hosts.at_second.kept) == (3, 0)
    assert not await hosts.second.client.read(hot)
