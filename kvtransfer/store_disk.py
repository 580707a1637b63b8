"""A store's disk below its memory: what was accepted is written behind, what is missing is brought up for a hold.

Every accepted block is written, not only the victims of eviction: eviction then never waits for the disk, and a store that is
killed has on disk whatever it had accepted a moment ago. The price is writes for blocks that memory would have kept.
A disk that cannot be had, or stops working (the tier says so, once), is done without.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

from core.blocks import BlockKey, KvLayout
from core.config import StoreConfig
from core.errors import ConfigError, OutOfBlocksError, TransferError
from core.inventory import Inventory
from kvtransfer.arena import Arena
from kvtransfer.codec import NO_DIGEST, digest_of
from kvtransfer.directory import Tier
from kvtransfer.disk import DiskOptions, DiskTier
from kvtransfer.disk_index import Record
from kvtransfer.kv_node import NodeEntry

log = logging.getLogger(__name__)

BEHIND_MAX = 65_536  # keys that wait to be written; beyond it the oldest are forgotten and counted
PUT_BYTES = 4 * 2**20  # copied to the writer between two turns of the loop
PROMOTE_BLOCKS = 64  # brought up at a time: a deadline keeps what came before it
QUEUE_BYTES = 16 * 2**20


class _Wanted(NamedTuple):
    """A block on disk, with what is charged, weighed and checked in memory."""

    key: BlockKey
    record: Record


class StoreDisk:
    """The disk tier of one arena, or its absence. On the event loop; `run` beside everything else."""

    def __init__(self, tier: DiskTier | None, arena: Arena, inventory: Inventory, off: str = "") -> None:
        self.tier = tier
        self.forgotten = 0
        """Blocks that were never written because too many waited, or they were evicted before their turn."""
        self.spoiled: Callable[[BlockKey], None] = lambda key: None
        """Hears of a block in memory that is not what its digest says. Written, it would come back with a digest that fits."""
        self._arena = arena
        self._inventory = inventory
        self._off = off
        self._behind: OrderedDict[BlockKey, None] = OrderedDict()
        self._wake = asyncio.Event()

    @classmethod
    async def open(
        cls, config: StoreConfig, directory: Path, layout: KvLayout, arena: Arena, inventory: Inventory
    ) -> StoreDisk:
        """Never raises for a disk that cannot be used: the store serves from memory then, and says so."""
        if not config.disk_dir:
            return cls(None, arena, inventory)
        options = DiskOptions(queue_bytes=max(QUEUE_BYTES, 4 * layout.block_bytes), tenant_share=config.tenant_share)
        try:
            tier = await asyncio.to_thread(DiskTier.open, directory, layout, int(config.disk_bytes), options)
        except ConfigError as error:
            log.warning("the store does without its disk: %s", error)
            return cls(None, arena, inventory, off=str(error))
        return cls(tier, arena, inventory)

    @property
    def off(self) -> str:
        """Why nothing is written; empty while all is well, or no disk was asked for."""
        return self._off or (self.tier.writes_off if self.tier is not None else "")

    def accepted(self, keys: Sequence[BlockKey]) -> None:
        """Committed blocks, to be written when there is time."""
        if self.tier is None or self.off:
            return
        for key in keys:
            self._behind[key] = None
        while len(self._behind) > BEHIND_MAX:
            self._behind.popitem(last=False)
            self.forgotten += 1
        self._wake.set()

    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        return self.tier.contains(keys) if self.tier is not None else [False] * len(keys)

    def resident(self) -> list[BlockKey]:
        return self.tier.keys() if self.tier is not None else []

    def entries(self) -> list[NodeEntry]:
        """What is on disk, for tools. Ages are told by the wall clock: blocks outlive the process that wrote them."""
        if self.tier is None:
            return []
        size, now_s = self._arena.block_bytes, self.tier.now_s()
        return [
            NodeEntry(
                key,
                Tier.DISK,
                size,
                tenant=record.tenant,
                digest=record.digest,
                cost_s=record.cost_s,
                age_s=max(0.0, now_s - record.written_s),
            )
            for key, record in self.tier.records()
        ]

    async def promote(self, keys: Sequence[BlockKey], deadline_s: float) -> list[int]:
        """Brings up what is on disk, as far as memory and `deadline_s` reach: blocks, a reference for the caller on each."""
        blocks: list[int] = []
        if self.tier is None:
            return blocks
        found = zip(keys, self.tier.find(keys), strict=True)
        wanted = [_Wanted(key, record) for key, record in found if record is not None]
        try:
            async with asyncio.timeout(deadline_s):
                for tenant, theirs in groupby(wanted, key=lambda one: one.record.tenant):
                    while part := list(islice(theirs, PROMOTE_BLOCKS)):
                        blocks += await self._bring_up(part, tenant)
        except (TimeoutError, TransferError, OutOfBlocksError) as error:
            log.debug("%d of %d blocks came up from disk: %s", len(blocks), len(wanted), error)
        except asyncio.CancelledError:
            self._inventory.release(blocks)
            raise
        return blocks

    async def run(self) -> None:
        """Writes behind, until cancelled."""
        while True:
            self._wake.clear()
            await self._write()
            await self._wake.wait()

    async def flush(self) -> bool:
        """Waits until all that was accepted is written or given up; False when that takes too long."""
        await self._write()
        return self.tier is None or await self.tier.flush()

    async def close(self) -> None:
        """Hands over what still waits, as far as the writer takes it, then closes the tier."""
        if self.tier is None:
            return
        while self._behind and self._put(self._behind.popitem(last=False)[0]):
            pass
        await self.tier.close()

    async def _bring_up(self, wanted: Sequence[_Wanted], tenant: bytes) -> list[int]:
        """Blocks of one tenant, charged to it as when they were offered."""
        assert self.tier is not None, "nothing is on a disk that is not there"
        inventory, view = self._inventory, self._arena.bytes_view()
        blocks = inventory.allocate(len(wanted), tenant=tenant)
        up: list[int] = []
        try:
            whole = await self.tier.get([one.key for one in wanted], [view[block] for block in blocks])
            now = self.tier.find([one.key for one in wanted])
        except BaseException:
            inventory.release(blocks)
            raise
        for one, block, came, still in zip(wanted, blocks, whole, now, strict=True):
            if came:
                digest = one.record.digest if still is one.record else NO_DIGEST  # written anew meanwhile: other bytes
                up.append(inventory.commit(block, one.key, digest, tenant=tenant, cost_s=one.record.cost_s))
            else:
                inventory.release([block])
        return up

    async def _write(self) -> None:
        burst = max(1, PUT_BYTES // self._arena.block_bytes)
        written = 0
        while self._behind and not self._is_off():
            key = next(iter(self._behind))
            if not self._put(key):
                if not self._is_off() and self.tier is not None:
                    await self.tier.flush()  # the writer is behind: wait for it instead of dropping
                continue
            self._behind.pop(key, None)
            written += 1
            if written % burst == 0:
                await asyncio.sleep(0)
        if self._is_off():
            self._behind.clear()

    def _put(self, key: BlockKey) -> bool:
        """False when it should be tried again."""
        assert self.tier is not None
        [block] = self._inventory.look([key])
        if block is None:
            self.forgotten += 1
            return True
        span, digest = self._arena.bytes_view()[block], self._inventory.digest(block)
        try:
            whole = digest == NO_DIGEST or digest_of(span) == digest
            if whole:
                return self.tier.put(key, span, self._inventory.tenant_of(block), self._inventory.cost_of(block))
        finally:
            self._inventory.release([block])
        self.spoiled(key)
        return True

    def _is_off(self) -> bool:
        return self.tier is None or bool(self.off)
