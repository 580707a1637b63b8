"""The destination's side of a hand-off: follows a ticket and fills blocks of its own as they are announced."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field

from core.blocks import BlockKey, BlockRecord, Closing, KvLayout, KvTicket
from core.clock import Clock
from core.config import TransferConfig
from core.errors import DigestMismatchError, LayoutMismatchError, TransferError
from core.inventory import Inventory
from kvtransfer.channels import Channels
from kvtransfer.codec import LOSSY, agreed, check_codec
from kvtransfer.complaint import complain
from kvtransfer.fetch import Fetcher
from kvtransfer.following import Following, SourceGoneError
from kvtransfer.handoff import Ingest
from kvtransfer.transport import BlocksGoneError


@dataclass(slots=True)
class IngestPlan:
    """What the caller wants and where. It holds one reference on every block in `blocks`, before, during and after the pull.

    `blocks[place]` is the block for that place of the request. The list is kept up to date in place: when a landed block
    turns out to be resident already under its key, the reference moves to the resident one. So it names what the caller
    holds also after a failure or a cancellation.
    """

    keys: Sequence[BlockKey]
    """Of the full blocks, computed from the caller's own tokens."""
    num_tokens: int
    blocks: list[int]
    local: frozenset[int] = frozenset()
    """Places whose blocks hold their KV already."""
    lossy: str = ""
    """The lossy codec the caller puts up with."""
    salted_keys: Sequence[BlockKey] = ()
    """The full blocks' keys in the chain of that codec: what comes through it is committed under these."""
    salted: set[int] = field(default_factory=set)
    """Places whose KV is not exact, those found so beforehand and those that came so; kept up to date like `blocks`."""
    tenant: bytes = b""
    """Whom what comes is charged to."""


@dataclass(frozen=True, slots=True)
class IngestResult:
    closing: Closing
    bytes: int
    transfer_s: float
    """Time spent in transports."""
    transfer_exposed_s: float
    """From the closing record's arrival to the last block's."""
    transport: str
    """That of the last block; empty when nothing had to be moved."""
    codec: str = ""
    """The lossy codec that some of the blocks, those found locally included, have gone through; empty: all are exact."""


@dataclass(slots=True)
class PullStats:
    """Plain numbers, read when metrics are scraped."""

    pulls: int = 0
    failures: Counter[str] = field(default_factory=Counter)  # by error code


class Puller:
    """One per worker. Any number of pulls at the same time."""

    def __init__(
        self,
        layout: KvLayout,
        inventory: Inventory,
        fetcher: Fetcher,
        channels: Channels,
        config: TransferConfig,
        clock: Clock,
        *,
        puller_id: str,
    ) -> None:
        self.stats = PullStats()
        self.layout = layout
        self.inventory = inventory
        self.fetcher = fetcher
        self.channels = channels
        self.config = config
        self.clock = clock
        self.puller_id = puller_id
        self._finishing: set[asyncio.Task[None]] = set()

    async def pull(self, ticket: KvTicket, plan: IngestPlan) -> IngestResult:
        """Fills `plan.blocks` and commits the full ones, or raises TransferError or a child.

        LayoutMismatchError names the field in which the two ends differ. However it ends, cancelled included, the source
        is told, and from then on nothing writes into the blocks.
        """
        self.stats.pulls += 1
        try:
            self._check(ticket)
            return await self._follow(ticket, plan)
        except SourceGoneError as error:
            self.fetcher.forget(ticket.source)
            self.channels.forget(ticket.source)
            self.stats.failures[error.code] += 1
            raise
        except DigestMismatchError as error:
            self.stats.failures[error.code] += 1
            self._begin(complain(self.channels, ticket.source, plan.keys), f"kv-complain {ticket.source.worker_id}")
            raise
        except TransferError as error:
            self.stats.failures[error.code] += 1
            raise

    async def close(self) -> None:
        """After the last pull has ended: waits for the farewells still on their way."""
        if self._finishing:
            await asyncio.wait(self._finishing)

    def _check(self, ticket: KvTicket) -> None:
        mismatch = self.layout.mismatch(ticket.layout)
        if mismatch is not None:
            raise LayoutMismatchError(f"blocks of {ticket.source.worker_id} do not fit: {mismatch}")
        check_codec(ticket.codec)
        self.fetcher.meet(ticket.source)

    async def _follow(self, ticket: KvTicket, plan: IngestPlan) -> IngestResult:
        handoff = _Handoff(self, ticket, plan)
        following = Following(
            self.channels,
            ticket,
            handoff,
            self.clock,
            puller_id=self.puller_id,
            lease_margin_s=self.config.lease_margin_s,
        )
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(following.run(), name=f"kv-follow {ticket.key}"),
                    group.create_task(following.keep(), name=f"kv-lease {ticket.key}"),
                ]
                result = await handoff.run()
                for task in tasks:
                    task.cancel()
        except BaseExceptionGroup as group_error:
            raise _first(group_error) from None
        finally:
            self._begin(following.finish(), f"kv-done {ticket.key}")
        return result

    def _begin(self, farewell: Coroutine[object, object, None], name: str) -> None:
        """Nobody waits for it: the request goes on at once."""
        task = asyncio.create_task(farewell, name=name)
        self._finishing.add(task)
        task.add_done_callback(self._finishing.discard)


class _Handoff:
    """One pull: what the source says goes into the Ingest, what the Ingest wants is fetched, committed and noted."""

    def __init__(self, puller: Puller, ticket: KvTicket, plan: IngestPlan) -> None:
        self._puller = puller
        self._ticket = ticket
        self._plan = plan
        self._codec = agreed(ticket.codec, plan.lossy)
        self._ingest = Ingest(plan.keys, plan.num_tokens, puller.layout.block_size, plan.local)
        self._news = asyncio.Event()
        self._bytes = 0
        self._transfer_s = 0.0
        self._transport = ""
        self._closed_at = self._landed_at = 0.0

    def announced(self, records: list[BlockRecord]) -> None:
        self._ingest.announced(records)
        self._news.set()

    def closed(self, closing: Closing) -> None:
        if self._ingest.closing is None:
            self._closed_at = self._puller.clock.now()
        self._ingest.closed(closing)
        self._news.set()

    async def run(self) -> IngestResult:
        await self._open()
        while not self._ingest.complete:
            records = self._ingest.take()  # all that was announced while the last batch was on its way
            if records:
                await self._move(records)
            else:
                self._news.clear()
                await self._news.wait()  # the lease, kept beside us, is the deadline
        closing = self._ingest.closing
        assert closing is not None
        exposed_s = max(0.0, self._landed_at - self._closed_at) if self._landed_at else 0.0
        codec = self._plan.lossy if self._plan.salted else ""
        return IngestResult(closing, self._bytes, self._transfer_s, exposed_s, self._transport, codec)

    async def _open(self) -> None:
        """Maps or dials while prefill still computes, so that the first blocks do not wait for it."""
        if self._ingest.missing:
            await self._puller.fetcher.open(self._ticket.source, self._ticket.key)

    async def _move(self, records: Sequence[BlockRecord]) -> None:
        plan, inventory = self._plan, self._puller.inventory
        dest_blocks = [plan.blocks[record.index] for record in records]
        try:
            result = await self._puller.fetcher.fetch(self._ticket.source, self._ticket.key, records, dest_blocks, self._codec)
        except BlocksGoneError as gone:
            self._ingest.returned(records, frozenset(gone.indices) or frozenset(r.index for r in records))
            return
        for record, block in zip(records, dest_blocks, strict=True):
            if result.codec in LOSSY:  # another block than the announced one: never under its key, never with its digest
                plan.salted.add(record.index)
                if record.key:
                    plan.blocks[record.index] = inventory.commit(
                        block, plan.salted_keys[record.index], tenant=plan.tenant, shared=False
                    )
            elif record.key:
                plan.blocks[record.index] = inventory.commit(block, record.key, record.digest, tenant=plan.tenant)
            self._ingest.landed(record.index)
        self._landed_at = self._puller.clock.now()
        self._transport = result.transport
        self._bytes += result.bytes
        self._transfer_s += result.seconds


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that ended a task group: ours when there is one."""
    leaves = [e for e in group.exceptions if not isinstance(e, BaseExceptionGroup)]
    leaves += [_first(e) for e in group.exceptions if isinstance(e, BaseExceptionGroup)]
    return next((e for e in leaves if isinstance(e, TransferError)), leaves[0])
