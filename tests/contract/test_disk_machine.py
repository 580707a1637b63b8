"""The disk tier against a dict: puts, gets, evictions, restarts, damage and want of room in any order."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from disk_rig import BLOCK_BYTES, ROOMY, block, key, segment_paths, served, tier
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

NUMBERS = st.integers(0, 15)
EVERY = range(16)
TIGHT = 3 * (8192 + 4 * (64 + BLOCK_BYTES))


class DiskMachine(RuleBasedStateMachine):
    """Model: the numbers whose blocks must be served. Whatever is served is whole (`served` asserts it)."""

    bytes_max = ROOMY
    exact = True  # False: what was put may be dropped for want of room, what was evicted stays away

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.directory = tempfile.TemporaryDirectory(prefix="tandem-disk-")
        self.root = Path(self.directory.name)
        self.disk = tier(self.root, self.bytes_max)
        self.model: set[int] = set()

    @rule(numbers=st.lists(NUMBERS, max_size=8, unique=True))
    def put(self, numbers: list[int]) -> None:
        for n in numbers:
            assert self.disk.put(key(n), block(key(n)))
        assert self.runner.run(self.disk.flush())
        self.model |= set(numbers)

    @rule(numbers=st.lists(NUMBERS, max_size=8))
    def get(self, numbers: list[int]) -> None:
        expected = [n for n in numbers if n in self.model]
        got = self.runner.run(served(self.disk, numbers))
        assert got == expected if self.exact else set(got) <= set(expected)

    @rule(n=NUMBERS)
    def evict(self, n: int) -> None:
        was = self.runner.run(self.disk.evict(key(n)))
        assert was == (n in self.model) if self.exact else not was or n in self.model
        self.model.discard(n)

    @rule(n=NUMBERS)
    def put_and_evict_at_once(self, n: int) -> None:
        self.disk.put(key(n), block(key(n)))
        assert self.runner.run(self.disk.evict(key(n)))
        assert self.runner.run(self.disk.flush())
        self.model.discard(n)

    @rule()
    def restart(self) -> None:
        self.runner.run(self.disk.close())
        self.disk = tier(self.root, self.bytes_max)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        """A bit of some record's bytes flips: at most that block is gone."""
        paths = [path for path in segment_paths(self.root) if path.stat().st_size > 8192]
        if not paths:
            return
        path = data.draw(st.sampled_from(paths))
        whole = bytearray(path.read_bytes())
        whole[data.draw(st.integers(8192, len(whole) - 1))] ^= 16
        path.write_bytes(whole)
        before = self.model if self.exact else set(self.runner.run(served(self.disk, EVERY)))
        after = set(self.runner.run(served(self.disk, EVERY)))
        assert after <= self.model
        assert not self.exact or len(before - after) <= 1
        self.model = after

    @rule()
    def verify(self) -> None:
        report = self.runner.run(self.disk.verify())
        assert report.dropped == 0, "the damage was found when it was done"

    @invariant()
    def the_index_holds_together(self) -> None:
        with self.disk._store.lock:
            self.disk._store.index.check()
        on_disk = sum(path.stat().st_size for path in segment_paths(self.root))
        assert on_disk <= self.bytes_max
        assert on_disk <= self.disk.disk_bytes

    def teardown(self) -> None:
        self.runner.run(self.disk.close())
        self.runner.close()
        self.directory.cleanup()


class TightMachine(DiskMachine):
    bytes_max = TIGHT
    exact = False


TestDisk = DiskMachine.TestCase
TestDisk.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
TestTightDisk = TightMachine.TestCase
TestTightDisk.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
