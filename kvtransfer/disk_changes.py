"""What came to and went from a store's disk, for one listener: its keys now against those it was told of."""

from __future__ import annotations

import asyncio

from core.blocks import BlockKey
from kvtransfer.store_disk import StoreDisk

LOOK_S = 2.0
"""The disk's keys are compared at most so often: there may be millions."""


class DiskChanges:
    """`told` when the listener has heard; until then the same is found again."""

    def __init__(self, disk: StoreDisk) -> None:
        self._disk = disk
        self._known: frozenset[BlockKey] = frozenset()
        self._seen = (-1, -LOOK_S)  # the disk's count of changes, and when we looked

    async def look(self, now: float) -> tuple[list[BlockKey], list[BlockKey]]:
        """Keys that came and that went; nothing while the disk does not change, or was looked at a moment ago."""
        tier = self._disk.tier
        if tier is None:
            return [], []
        stats = tier.stats
        count = stats.put_blocks + stats.dropped_blocks + stats.evicted_blocks + stats.corrupt_blocks + stats.read_errors
        seen, looked_at = self._seen
        if count == seen or now - looked_at < LOOK_S:
            return [], []
        self._seen = (count, now)
        on_disk = frozenset(await asyncio.to_thread(tier.keys))
        return list(on_disk - self._known), list(self._known - on_disk)

    def told(self, came: list[BlockKey], went: list[BlockKey]) -> None:
        if came or went:
            self._known = (self._known - frozenset(went)) | frozenset(came)
