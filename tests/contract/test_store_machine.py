"""The store against a dict: offers, holds, ends of leases, evictions, rot in memory and restarts in any order.

No block leaks, no lease outlives its holder, and no byte is served that was not offered.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from store_rig import LAYOUT, WORKER_EPOCH, bytes_of, keys_of, store_spec

from core.blocks import BlockRecord, KvSource
from core.clock import ManualClock
from core.errors import PinLimitError
from core.inventory import Inventory
from core.request import AttemptKey
from kvtransfer.arena import HostArena
from kvtransfer.codec import digest_of
from kvtransfer.exports import Exports
from kvtransfer.loopback import PROCESS_HUB
from kvtransfer.store_node import StoreNode
from kvtransfer.store_offers import Offer

LARGE = replace(LAYOUT, num_layers=16, kv_heads=4, head_dim=8)  # 64 KiB: the store's memory holds 16 blocks
PROMPTS = [keys_of(f"prompt {n}", 8, LARGE) for n in range(5)]
BYTES = {key: bytes_of(key, LARGE) for keys in PROMPTS for key in keys}
KEYS = st.builds(lambda prompt, first, count: prompt[first : first + count], st.sampled_from(PROMPTS), *[st.integers(0, 8)] * 2)
HOLDERS = st.integers(0, 3)


@dataclass
class Held:
    until: float
    records: list[BlockRecord]


class Source:
    """The worker whose blocks are offered; it has all of them, always."""

    def __init__(self, clock: ManualClock) -> None:
        self.arena = HostArena(len(BYTES), LARGE.block_bytes)
        self.inventory = Inventory(len(BYTES), self.arena.generation_words())
        self.exports = Exports(WORKER_EPOCH, self.arena, self.inventory, clock, layout=LARGE)
        self.source = KvSource("machine-0", WORKER_EPOCH, "", "", "", len(BYTES), ("loopback",))
        for block, (key, data) in zip(self.inventory.allocate(len(BYTES)), BYTES.items(), strict=True):
            self.arena.bytes_view()[block] = data
            self.inventory.commit(block, key)


class StoreMachine(RuleBasedStateMachine):
    """Model: who holds what until when, what is pinned, what rots in memory, and, with a disk, what has to be there."""

    disk = False

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.folder = tempfile.TemporaryDirectory(prefix="tandem-store-")
        self.clock = ManualClock(100.0)
        self.worker = Source(self.clock)
        PROCESS_HUB.register("machine-0", WORKER_EPOCH, self.worker.arena)
        self.epoch, self.offers = 0, 0
        self.holds: dict[AttemptKey, Held] = {}
        self.offered: set[bytes] = set()
        self.rotten: set[bytes] = set()
        self.stored: set[bytes] = set()  # on disk
        self.pinned: set[bytes] = set()
        self.start()

    def start(self) -> None:
        self.epoch += 1
        overrides = {"transfer__transport": "loopback"}
        root = Path(self.folder.name)
        spec = replace(store_spec(root, root / "disk" if self.disk else None, **overrides), epoch=self.epoch)
        self.node = StoreNode(spec, self.clock, "", lambda: "")
        self.runner.run(self.node.start())

    @rule(keys=KEYS, tenant=st.sampled_from([b"", b"a"]))
    def offer(self, keys: list[bytes], tenant: bytes) -> None:
        self.offers += 1
        holder = AttemptKey(f"hold/offer/{self.offers}", 1)

        async def offered():
            records = await self.worker.exports.hold(holder, keys, 10.0)
            offer = Offer(holder, self.epoch, LARGE, self.worker.source, records, tenant)
            reply = await self.node.offer(offer)
            self.worker.exports.drop(holder)
            await self.node.plane.disk.flush()
            return reply

        room = 16 - len(self.active() | self.pinned)
        reply = self.runner.run(offered())
        assert reply.taken + reply.known + reply.refused == len(keys)
        assert not reply.refused or reply.refused > room - len(keys)
        self.offered |= set(keys)
        resident = self.resident()
        self.rotten &= resident
        if self.disk:
            self.stored |= {key for key in keys if key in resident and key not in self.rotten}

    @rule(number=HOLDERS, keys=KEYS, lease_s=st.sampled_from([1.0, 5.0]))
    def hold(self, number: int, keys: list[bytes], lease_s: float) -> None:
        holder = AttemptKey("hold/reader", number)
        held_before = {record.key for held in self.holds.values() for record in held.records}
        held = self.runner.run(self.node.hold(holder, self.epoch, LARGE, keys, lease_s))
        got = {record.key for record in held.records}
        assert all(keys[record.index] == record.key for record in held.records)
        assert got <= self.offered
        assert held_before & set(keys) <= got, "what somebody holds is there"
        assert all(record.digest == digest_of(BYTES[record.key]) for record in held.records)
        self.rotten &= self.resident()
        self.holds.pop(holder, None)
        if held.records:
            self.holds[holder] = Held(self.clock.now() + lease_s, held.records)

    @rule(number=HOLDERS)
    def drop(self, number: int) -> None:
        holder = AttemptKey("hold/reader", number)
        assert self.node.drop(holder, self.epoch) == (self.holds.pop(holder, None) is not None)

    @rule(seconds=st.sampled_from([0.4, 2.0, 6.0]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.node.tick()
        self.rotten &= self.resident()
        self.holds = {holder: held for holder, held in self.holds.items() if held.until > self.clock.now()}

    @rule(keys=st.one_of(st.none(), KEYS))
    def evict(self, keys: list[bytes] | None) -> None:
        self.runner.run(self.node.evict(keys))
        gone = self.offered if keys is None else set(keys)
        assert not gone & self.resident() - self.active() - self.pinned
        self.stored -= gone - self.resident()  # what is held stays on disk too
        self.rotten &= self.resident()

    @rule(keys=KEYS)
    def pin(self, keys: list[bytes]) -> None:
        try:
            reply = self.runner.run(self.node.pin(keys))
        except PinLimitError:
            assert len(self.pinned | set(keys)) > 8
        else:
            here = set(keys) & self.resident()
            now = set(self.node.plane.inventory.pinned_keys()) if self.node.plane is not None else set()
            assert self.pinned | here - self.rotten <= now <= self.pinned | here, "but what is to be dropped"
            assert reply.pinned_blocks == len(now) <= 8
            self.pinned = now
        self.rotten &= self.resident()

    @rule(keys=st.one_of(st.none(), KEYS))
    def unpin(self, keys: list[bytes] | None) -> None:
        gone = self.pinned if keys is None else self.pinned & set(keys)
        assert self.node.unpin(keys).pinned == len(gone)
        self.pinned = self.pinned - gone

    @rule(number=st.integers(0, 15))
    def rot(self, number: int) -> None:
        """A bit flips in memory: nobody is served the block once it was looked at, and it never reaches the disk."""
        entries = self.node.plane.inventory.entries() if self.node.plane is not None else []
        if number < len(entries) and entries[number].key not in self.rotten:
            self.node.plane.arena.bytes_view()[entries[number].block, 5] ^= 4
            self.rotten.add(entries[number].key)

    @rule()
    def verify(self) -> None:
        before = self.rotten & self.resident()
        report = self.runner.run(self.node.verify(()))
        assert report.dropped == len(before)
        assert not (before - self.active()) & self.resident()
        self.rotten &= self.resident()  # what is held goes when it is let go
        self.pinned -= before

    @rule()
    def restart(self) -> None:
        self.runner.run(self.node.close())
        self.holds.clear()
        self.rotten.clear()
        self.pinned.clear()
        self.start()
        if self.disk and self.node.plane is not None:
            assert set(self.node.plane.disk.resident()) == self.stored
        if not self.disk:
            self.offered.clear()

    @invariant()
    def nobody_holds_more_than_he_was_granted(self) -> None:
        if self.node.plane is None:
            return
        inventory = self.node.plane.inventory
        inventory.check()
        assert inventory.leases_open() == len(self.holds)
        assert inventory.counts().active == len(self.active() | self.pinned)
        assert self.pinned <= self.resident(), "what is pinned stays"
        assert self.node.plane.exports.holds_open == len(self.holds)

    @invariant()
    def what_is_held_are_the_bytes_that_were_offered(self) -> None:
        for held in self.holds.values():
            for record in held.records:
                assert self.node.plane.inventory.generation(record.block_id) == record.generation
                if record.key not in self.rotten:
                    assert (self.node.plane.arena.bytes_view()[record.block_id] == BYTES[record.key]).all()

    def active(self) -> set[bytes]:
        return {record.key for held in self.holds.values() for record in held.records}

    def resident(self) -> set[bytes]:
        return {entry.key for entry in self.node.plane.inventory.entries()} if self.node.plane is not None else set()

    def teardown(self) -> None:
        self.runner.run(self.node.close())
        self.runner.run(self.worker.exports.close())
        PROCESS_HUB.unregister("machine-0", WORKER_EPOCH)
        self.runner.close()
        self.folder.cleanup()


class DiskStoreMachine(StoreMachine):
    disk = True


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=30, stateful_step_count=100, deadline=None)
TestDiskStore = DiskStoreMachine.TestCase
TestDiskStore.settings = settings(max_examples=15, stateful_step_count=100, deadline=None)


def one_step(store: StoreMachine, rng: random.Random) -> None:
    """A random operation of the machine, at random."""
    prompt, first, count = rng.choice(PROMPTS), rng.randrange(9), rng.randrange(9)
    keys, number, move = prompt[first : first + count], rng.randrange(4), rng.randrange(100)
    if move < 35:
        store.offer(keys, rng.choice([b"", b"a"]))
    elif move < 60:
        store.hold(number, keys, rng.choice([1.0, 5.0]))
    elif move < 75:
        store.drop(number)
    elif move < 85:
        store.wait(rng.choice([0.4, 2.0, 6.0]))
    elif move < 90:
        store.evict(rng.choice([None, keys, keys]))
    elif move < 92:
        rng.choice([store.pin, store.unpin])(keys)
    elif move < 96:
        store.rot(rng.randrange(16))
    elif move < 99:
        store.verify()
    else:
        store.restart()


@pytest.mark.parametrize(("machine", "seed", "steps"), [(StoreMachine, 1, 10_000), (DiskStoreMachine, 2, 2_500)])
def test_ten_thousand_random_operations_leave_nothing_behind(machine: type[StoreMachine], seed: int, steps: int) -> None:
    """A quarter of that with a disk, which takes ten times as long for each."""
    store, rng = machine(), random.Random(seed)
    try:
        for _ in range(steps):
            one_step(store, rng)
            store.nobody_holds_more_than_he_was_granted()
            store.what_is_held_are_the_bytes_that_were_offered()
        for number in range(4):
            store.drop(number)
        store.unpin(None)
        store.evict(None)
        assert store.node.plane is not None
        counts = store.node.plane.inventory.counts()
        assert (counts.active, counts.cached) == (0, 0)
        assert store.offers > 0.3 * steps, "the run never got to what it is for"
    finally:
        store.teardown()
