"""The source's register of hand-offs: what the prefill worker tells it, followers hear.

Lives on the event loop of its worker; every method is called there. Digests that are missing are computed off it when they
are many, and announcements wait their turn so that a closing record never overtakes blocks.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from core.blocks import BlockKey, BlockRecord, Closing, KvLayout
from core.clock import Clock
from core.errors import InvalidRequestError, LeaseExpiredError, OverloadedError, StaleEpochError, TransferError
from core.inventory import Inventory
from core.request import AttemptKey
from kvtransfer.arena import Arena
from kvtransfer.codec import NO_DIGEST, digests_of
from kvtransfer.codecs import Codecs
from kvtransfer.follower import Follower
from kvtransfer.handoff import Export, ExportState
from kvtransfer.holds import HOLDS_MAX, NOTHING_FOLLOWS, check_keys, granted_s

log = logging.getLogger(__name__)

INLINE_BYTES_MAX = 4 * 2**20  # digested on the spot: 0.3 ms, while a thread is heard of a millisecond or two later
JOBS_MAX = 4096


@dataclass(frozen=True, slots=True)
class _Job:
    """Blocks to announce, and the closing record that follows them."""

    key: AttemptKey
    records: tuple[BlockRecord, ...]
    closing: Closing | None = None
    partial: BlockRecord | None = None


class Exports:
    def __init__(
        self,
        epoch: int,
        arena: Arena,
        inventory: Inventory,
        clock: Clock,
        *,
        digest: bool = True,
        layout: KvLayout | None = None,
    ) -> None:
        """`layout`: for holds, whose records name the tokens of a block, and for codecs; without it there is raw alone."""
        self.epoch = epoch
        self.arena = arena
        self.codecs = Codecs(layout)
        self.opened = 0
        self.ended: Counter[ExportState] = Counter()
        """How hand-offs ended, for the metrics."""
        self.held = 0
        self.holds_ended: Counter[ExportState] = Counter()
        """How holds ended."""
        self.on_end: Callable[[AttemptKey, ExportState], None] | None = None
        """Told of every export that ended, holds included, after its lease has."""
        self._inventory = inventory
        self._clock = clock
        self._digest = digest
        self._block_size = layout.block_size if layout is not None else 0
        self._holders: set[AttemptKey] = set()
        self._exports: dict[AttemptKey, Export] = {}
        self._attempts: dict[str, int] = {}
        self._followers: dict[AttemptKey, Follower] = {}
        self._jobs: deque[_Job] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="kv-digest")
        self._worker: asyncio.Task[None] | None = None
        self._closed = False

    def __len__(self) -> int:
        """Hand-offs on offer; holds are counted apart."""
        return len(self._exports) - len(self._holders)

    @property
    def holds_open(self) -> int:
        return len(self._holders)

    # -- the prefill worker ----------------------------------------------------------------------------------------

    def open(self, key: AttemptKey, lease_s: float) -> None:
        """Before the ticket is sent. A lower attempt of the request is revoked; raises TransferError below a higher one."""
        current = self._attempts.get(key.request_id)
        self.drop(key)  # names of holds and of requests never meet; if they do, the request goes first
        if current is not None and current >= key.attempt:
            raise TransferError(f"{key} is superseded by attempt {current}")
        if current is not None:
            self.revoke(AttemptKey(key.request_id, current), f"superseded by attempt {key.attempt}")
        self._exports[key] = Export(key, lease_s, self._clock.now())
        self._attempts[key.request_id] = key.attempt
        self.opened += 1

    def announce(self, key: AttemptKey, records: Sequence[BlockRecord]) -> None:
        """Committed blocks that the sequence holds. Unknown and ended keys are fine: nobody is to hear of them."""
        self._submit(_Job(key, tuple(records)))

    def close_(self, key: AttemptKey, closing: Closing, partial: BlockRecord | None = None) -> None:
        """After the blocks were leased to `key`: the closing record. Ends that lease at once when nobody wants the blocks."""
        self._submit(_Job(key, () if partial is None else (partial,), closing, partial))

    def revoke(self, key: AttemptKey, reason: str) -> None:
        """The request was cancelled or failed here. Idempotent; ends the lease too."""
        export = self._exports.get(key)
        if export is None:
            self._inventory.end(key)
        elif export.revoke(reason):
            self._remove(export)

    def expire(self, now: float) -> list[AttemptKey]:
        """To be called a few times per lease. Ends exports and leases whose time is up and says whose."""
        expired = dict.fromkeys(self._inventory.expire(now))
        for key, export in list(self._exports.items()):
            if export.expire(now) or (key in expired and export.revoke("its blocks' lease ran out")):
                expired[key] = None
                self._remove(export)
        for key in expired:
            log.warning("the lease of %s ran out: its puller is gone or stuck", key)
        return list(expired)

    async def close(self) -> None:
        """Revokes everything and stops the digest thread."""
        self._closed = True
        for key in list(self._exports):
            self.revoke(key, "the worker stops")
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.wait([self._worker])
        self._pool.shutdown(wait=False, cancel_futures=True)

    # -- reading by key --------------------------------------------------------------------------------------------

    async def hold(self, holder: AttemptKey, keys: Sequence[BlockKey], lease_s: float) -> list[BlockRecord]:
        """Leases what of `keys` is here to `holder`; any transport pulls it under that name until `drop` or the lease ends.

        A record's `index` is its place in `keys`; places that are missing are not here. Holding again under the same name
        takes the place of the earlier hold, so a caller may repeat itself and may renew. Raises InvalidRequestError (too
        many keys, no length of time, the name of a hand-off) and OverloadedError.
        """
        check_keys(keys)
        lease_s = granted_s(lease_s)
        if holder in self._exports and holder not in self._holders:
            raise InvalidRequestError(f"{holder} is a hand-off; holders call themselves hold/WORKER/N")
        if holder not in self._holders and len(self._holders) >= HOLDS_MAX:
            raise OverloadedError(f"{HOLDS_MAX} holds are open here; drop some, or retry later")
        found = [(place, block) for place, block in enumerate(self._inventory.find(keys)) if block is not None]
        blocks = [block for _, block in found]
        try:
            await self._ensure_digests(blocks)
            records = [self._record(place, keys[place], block) for place, block in found]
            self._register(holder, records, blocks, lease_s)  # after the last wait: a caller that was cancelled holds nothing
        finally:
            self._inventory.release(blocks)
        return records

    def drop(self, holder: AttemptKey) -> bool:
        """Ends a hold. Idempotent; False when there was none (any more)."""
        if holder not in self._holders:
            return False
        self.done(holder)
        return True

    def _register(self, holder: AttemptKey, records: Sequence[BlockRecord], blocks: Sequence[int], lease_s: float) -> None:
        self.drop(holder)
        if not records or self._closed:
            return
        now = self._clock.now()
        export = Export(holder, lease_s, now)
        export.announce(records, now)
        export.close(NOTHING_FOLLOWS, None, now)
        self._inventory.lease(holder, blocks, export.until)
        self._exports[holder] = export
        self._holders.add(holder)
        self.held += 1

    def _record(self, place: int, key: BlockKey, block: int) -> BlockRecord:
        inventory = self._inventory
        digest = inventory.digest(block) if self._digest else NO_DIGEST
        return BlockRecord(place, key, block, inventory.generation(block), digest, self._block_size)

    async def _ensure_digests(self, blocks: Sequence[int]) -> None:
        """Of blocks that the caller has references on."""
        missing = [block for block in blocks if not self._inventory.digest(block)] if self._digest else []
        if len(missing) * self.arena.block_bytes <= INLINE_BYTES_MAX:
            digests = self._digests(missing)
        else:
            digests = await asyncio.get_running_loop().run_in_executor(self._pool, self._digests, missing)
        for block, digest in digests.items():
            self._inventory.set_digest(block, digest)

    # -- the service -----------------------------------------------------------------------------------------------

    def follow(self, key: AttemptKey, epoch: int) -> Follower:
        """A follower that hears everything from the start; it takes the place of an earlier one.

        Raises StaleEpochError, and LeaseExpiredError when there is no such export (any more).
        """
        export = self.find(key, epoch)
        if (earlier := self._followers.get(key)) is not None:
            earlier.replace()
        follower = self._followers[key] = Follower(export)
        self.renew(key)
        return follower

    def unfollow(self, follower: Follower) -> None:
        if self._followers.get(follower.export.key) is follower:
            del self._followers[follower.export.key]

    def find(self, key: AttemptKey, epoch: int) -> Export:
        if epoch != self.epoch:
            raise StaleEpochError(f"this worker is of epoch {self.epoch}, the ticket of epoch {epoch}")
        export = self._exports.get(key)
        if export is None:
            raise LeaseExpiredError(f"{key} is not on offer here: it was never opened, has ended, or its lease ran out")
        return export

    def check_readable(self, key: AttemptKey, epoch: int, places: Collection[tuple[int, int]]) -> None:
        """Raises as `find` does, and TransferError unless every (block id, generation) was announced under `key`.

        The one method that other threads may call too: it only looks up, and the generation words guard the bytes.
        """
        export = self.find(key, epoch)
        if not export.offers_all(places):
            unknown = [block for block, generation in places if not export.offers_all([(block, generation)])]
            raise TransferError(f"blocks {unknown[:8]} of {key} were not announced by this worker")

    def renew(self, key: AttemptKey) -> bool:
        """False when there is nothing left to renew."""
        now = self._clock.now()
        export = self._exports.get(key)
        if export is None or not export.renew(now):
            return False
        self._inventory.renew(key, now + export.lease_s)  # no lease yet while prefill still runs
        return True

    def done(self, key: AttemptKey) -> None:
        """The puller has what it wants: ends export and lease. Idempotent."""
        export = self._exports.get(key)
        if export is not None and export.done():
            self._remove(export)

    # -- below: announcements in order, digests where they are missing ---------------------------------------------

    def _submit(self, job: _Job) -> None:
        if job.key not in self._exports:
            if job.closing is not None:
                self._inventory.end(job.key)
            return
        if len(self._jobs) >= JOBS_MAX:
            self.revoke(job.key, "digests cannot keep up with announcements")
            return
        missing = self._without_digest(job.records)
        if not self._jobs and len(missing) * self.arena.block_bytes <= INLINE_BYTES_MAX:
            try:
                self._apply(job, self._digests(missing))
            except Exception:
                self._mistaken(job)
            return
        self._jobs.append(job)  # removed when it has been applied: later ones queue behind it
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work(), name="kv-exports-digest")

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._jobs:
            job = self._jobs[0]
            try:
                missing = self._without_digest(job.records)
                self._apply(job, await loop.run_in_executor(self._pool, self._digests, missing))
            except Exception:
                self._mistaken(job)
            finally:
                self._jobs.popleft()

    def _mistaken(self, job: _Job) -> None:
        """Our own mistake, in an `except`: it must not hold up the announcements of other requests."""
        log.exception("announcing blocks of %s failed", job.key)
        self.revoke(job.key, "its blocks could not be announced")

    def _without_digest(self, records: Sequence[BlockRecord]) -> list[int]:
        if not self._digest:
            return []
        return [r.block_id for r in records if r.digest == NO_DIGEST and (not r.key or not self._inventory.digest(r.block_id))]

    def _digests(self, block_ids: Sequence[int]) -> dict[int, int]:
        return dict(zip(block_ids, digests_of(self.arena.bytes_view(), block_ids), strict=True))

    def _apply(self, job: _Job, digests: dict[int, int]) -> None:
        export = self._exports.get(job.key)
        records = tuple(self._with_digest(record, digests) for record in job.records)
        now = self._clock.now()
        if export is None:
            if job.closing is not None:
                self._inventory.end(job.key)
            return
        if job.closing is None:
            export.announce(records, now)
        else:
            export.close(job.closing, records[0] if records else None, now)
        if (follower := self._followers.get(job.key)) is not None:
            follower.wake()

    def _with_digest(self, record: BlockRecord, digests: dict[int, int]) -> BlockRecord:
        if not self._digest or record.digest != NO_DIGEST:
            return record
        digest = digests.get(record.block_id)
        if digest is None:
            digest = self._inventory.digest(record.block_id)
        elif record.key:
            self._inventory.set_digest(record.block_id, digest, record.generation)
        return replace(record, digest=digest)

    def _remove(self, export: Export) -> None:
        """Of an export that has just ended."""
        key = export.key
        self._exports.pop(key, None)
        if self._attempts.get(key.request_id) == key.attempt:
            del self._attempts[key.request_id]
        self._inventory.end(key)
        (self.holds_ended if key in self._holders else self.ended)[export.state] += 1
        self._holders.discard(key)
        if (follower := self._followers.pop(key, None)) is not None:
            follower.wake()
        if self.on_end is not None:
            self.on_end(key, export.state)
