"""Blocks that workers offer: what a store lacks is pulled from the worker's memory and becomes findable. Bounded all round."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from core.blocks import KEY_BYTES, BlockKey, BlockRecord, KvLayout, KvSource
from core.errors import (
    DigestMismatchError,
    InvalidRequestError,
    OutOfBlocksError,
    OverloadedError,
    StaleEpochError,
    TransferError,
)
from core.request import AttemptKey
from core.telemetry import TRANSFER_BYTES, TRANSFER_SECONDS, Histogram
from kvtransfer.disk_tenants import TENANT_BYTES_MAX
from kvtransfer.holds import HOLD_KEYS_MAX
from kvtransfer.store_plane import StorePlane
from kvtransfer.transport import BlocksGoneError

log = logging.getLogger(__name__)

OFFERS_RUNNING = 4
OFFERS_WAITING_MAX = 64
BATCH_BYTES = 16 * 2**20  # taken at a time: a small store is not emptied for blocks that may never come


@dataclass(frozen=True, slots=True)
class Offer:
    """`holder` holds a lease on the records' blocks at `source`."""

    holder: AttemptKey
    epoch: int
    layout: KvLayout
    source: KvSource
    records: Sequence[BlockRecord]
    tenant: bytes = b""
    cost_s: float = 0.0


@dataclass(slots=True)
class Offered:
    """Blocks of one offer, or of all, by what became of them."""

    taken: int = 0
    known: int = 0
    refused: int = 0


@dataclass(slots=True)
class OfferStats:
    """Plain numbers, read when metrics are scraped."""

    blocks: Offered = field(default_factory=Offered)
    turned_away: int = 0
    seconds: Histogram = field(default_factory=lambda: Histogram(TRANSFER_SECONDS))
    bytes: Histogram = field(default_factory=lambda: Histogram(TRANSFER_BYTES))


def check_offer(offer: Offer) -> None:
    """Raises InvalidRequestError for what can be no offer."""
    if len(offer.records) > HOLD_KEYS_MAX:
        raise InvalidRequestError(f"{len(offer.records)} blocks in one offer; offer at most {HOLD_KEYS_MAX}")
    if any(len(record.key) != KEY_BYTES for record in offer.records):
        raise InvalidRequestError("only full blocks can be offered: one has no key")
    if len({record.index for record in offer.records}) != len(offer.records):
        raise InvalidRequestError("two blocks of an offer have the same place")
    if len(offer.tenant) > TENANT_BYTES_MAX:
        raise InvalidRequestError(f"a tenant of {len(offer.tenant)} bytes; name it in at most {TENANT_BYTES_MAX}")
    if not (math.isfinite(offer.cost_s) and offer.cost_s >= 0):
        raise InvalidRequestError(f"computing a block cannot take {offer.cost_s:g} s")


class Offers:
    """Carries offers out, a few at a time; `accepted` hears whose offer brought which keys."""

    def __init__(self, pull_timeout_s: float, accepted: Callable[[AttemptKey, Sequence[BlockKey]], None]) -> None:
        self.stats = OfferStats()
        self._timeout_s = pull_timeout_s
        self._accepted = accepted
        self._slots = asyncio.Semaphore(OFFERS_RUNNING)
        self._open = 0
        self._coming: set[BlockKey] = set()  # being pulled for another offer

    def __len__(self) -> int:
        return self._open

    async def take(self, plane: StorePlane, offer: Offer) -> Offered:
        """Comes back when every block is here, was here, or cannot be had. Raises OverloadedError, StaleEpochError."""
        if self._open >= OFFERS_RUNNING + OFFERS_WAITING_MAX:
            self.stats.turned_away += 1
            raise OverloadedError(f"{self._open} offers are open here; retry later")
        plane.fetcher.meet(offer.source)
        started, told = time.perf_counter(), Offered()
        self._open += 1
        try:
            async with self._slots:
                await self._carry_out(plane, offer, told)
        finally:
            self._open -= 1
            self._note(plane, told, time.perf_counter() - started)
        return told

    async def _carry_out(self, plane: StorePlane, offer: Offer, told: Offered) -> None:
        wanted = [r for r in self._unknown(plane, offer.records, told) if r.key not in self._coming]
        told.known = len(offer.records) - len(wanted)
        keys = {record.key for record in wanted}
        self._coming |= keys
        batch = max(1, min(BATCH_BYTES // plane.layout.block_bytes, plane.arena.num_blocks // 2))
        try:
            async with asyncio.timeout(self._timeout_s):
                for start in range(0, len(wanted), batch):
                    told.taken += await self._take(plane, offer, wanted[start : start + batch])
        except (TimeoutError, OutOfBlocksError, TransferError) as error:
            log.debug("an offer of %s ended early: %s", offer.source.worker_id, error)
        finally:
            self._coming -= keys
            told.refused = len(wanted) - told.taken

    def _unknown(self, plane: StorePlane, records: Sequence[BlockRecord], told: Offered) -> list[BlockRecord]:
        """Of each key once, what is not here. To be offered counts as a use: whoever computed it wanted it."""
        found = plane.inventory.find([record.key for record in records])
        plane.inventory.release([block for block in found if block is not None])
        unknown = {record.key: record for record, block in zip(records, found, strict=True) if block is None}
        return list(unknown.values())

    async def _take(self, plane: StorePlane, offer: Offer, records: Sequence[BlockRecord]) -> int:
        blocks = plane.inventory.allocate(len(records), tenant=offer.tenant)
        taken: list[BlockKey] = []
        try:
            for place in await self._pull(plane, offer, records, blocks):
                record = records[place]
                blocks[place] = plane.inventory.commit(
                    blocks[place], record.key, record.digest, tenant=offer.tenant, cost_s=offer.cost_s
                )
                taken.append(record.key)
        finally:
            plane.inventory.release(blocks)
            if taken:
                self._accepted(offer.holder, taken)
        return len(taken)

    async def _pull(
        self, plane: StorePlane, offer: Offer, records: Sequence[BlockRecord], blocks: Sequence[int]
    ) -> Sequence[int]:
        """The places whose blocks have arrived whole. Raises TransferError when the source gives nothing (any more)."""
        places = list(range(len(records)))
        while places:
            try:
                await plane.fetcher.fetch(offer.source, offer.holder, [records[n] for n in places], [blocks[n] for n in places])
                return places
            except BlocksGoneError as gone:
                left = [n for n in places if records[n].index not in gone.indices]
                if len(left) == len(places):
                    raise
                places = left
            except DigestMismatchError:
                return await self._pull_halves(plane, offer, records, blocks, places)
            except StaleEpochError:
                plane.fetcher.forget(offer.source)
                raise
        return places

    async def _pull_halves(
        self, plane: StorePlane, offer: Offer, records: Sequence[BlockRecord], blocks: Sequence[int], places: Sequence[int]
    ) -> list[int]:
        """One bad block must not cost its neighbours: halves it until it stands alone."""
        if len(places) == 1:
            log.warning("a block that %s offered is not what its digest says; it is not taken", offer.source.worker_id)
            plane.node.counts.digest_failures += 1
            return []
        whole: list[int] = []
        for part in (places[: len(places) // 2], places[len(places) // 2 :]):
            came = await self._pull(plane, offer, [records[n] for n in part], [blocks[n] for n in part])
            whole += [part[n] for n in came]
        return whole

    def _note(self, plane: StorePlane, told: Offered, seconds: float) -> None:
        total = self.stats.blocks
        total.taken += told.taken
        total.known += told.known
        total.refused += told.refused
        if told.taken:
            self.stats.seconds.observe(seconds)
            self.stats.bytes.observe(told.taken * plane.layout.block_bytes)
