"""Copies of hot blocks on other hosts: made where readers sit, given up again when nobody reads them.

The store whose blocks a host keeps fetching offers them to the store of that host, which pulls them like any offer; so
nobody writes into foreign memory here either. Whoever holds a copy forgets it when it is not used and somebody else has it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import grpc

from core.blocks import BlockKey, BlockRecord, KvSource
from core.clock import Clock
from core.errors import TandemError
from core.replication import Replication
from core.request import AttemptKey, WorkerRole
from core.wire import key_to_pb, layout_to_pb, record_to_pb, source_to_pb
from kvtransfer.channels import Channels
from kvtransfer.directory import Directory, NodeRecord
from kvtransfer.holds import HOLD_KEYS_MAX
from kvtransfer.rpc import transfer_error
from kvtransfer.store_node import StoreNode
from kvtransfer.store_plane import StorePlane
from tandem.cancelling import heed_cancellation
from tandem.v1 import kv_pb2

log = logging.getLogger(__name__)

PREFIX = "replica/"
OFFER_TIMEOUT_S = 10.0
LEASE_S = 12.0


class Replicas:
    """Beside a StoreNode, on its loop. `host_id` is that of the store; `hits` and `window_s` are those of `Replication`."""

    def __init__(self, store: StoreNode, directory: Directory, hits: int, window_s: float, clock: Clock, host_id: str) -> None:
        self.made = 0
        """Blocks that other hosts took a copy of."""
        self.given_up = 0
        self._store = store
        self._directory = directory
        self._new_counts: Callable[[], Replication] = partial(Replication, hits, window_s=window_s)
        self._clock = clock
        self._host_id = host_id
        self._nodes: dict[str, NodeRecord] = {}
        self._fetches: dict[str, Replication] = {}  # by the host that fetches
        self._copies = self._new_counts()  # that we hold for others
        self._channels = Channels()
        self._count = 0
        store.on_held = self._on_held
        store.on_taken = self._on_taken

    @property
    def kept(self) -> int:
        """Copies that this store has of blocks of other hosts."""
        return len(self._copies)

    async def run(self, every_s: float) -> None:
        """Looks every `every_s` seconds, until cancelled."""
        while True:
            await asyncio.sleep(every_s)
            try:
                await self.turn()
            except TandemError as error:
                log.debug("no copies this time: %s", error.message)

    async def turn(self) -> None:
        """One look at what is hot and what is cold. Raises DirectoryError."""
        plane = self._store.plane
        if plane is None:
            return
        self._nodes = {node.source.worker_id: node for node in await self._directory.nodes()}
        hosts = {node.source.host_id for node in self._nodes.values()}
        self._fetches = {host: counts for host, counts in self._fetches.items() if host in hosts}
        for host, counts in self._fetches.items():
            keys = counts.decide(self._clock.now()).make
            if keys and (there := self._store_of(host)) is not None:
                await self._offer(plane, there, keys)
        await self._give_up(plane, self._copies.decide(self._clock.now()).give_up)

    async def close(self) -> None:
        await self._channels.close()

    def _on_held(self, holder: AttemptKey, keys: Sequence[BlockKey]) -> None:
        """Holders are named `hold/WORKER/N`; the directory knows where WORKER is."""
        self._copies.used(keys)
        parts = holder.request_id.split("/")
        node = self._nodes.get(parts[1]) if len(parts) == 3 else None
        if node is not None and node.source.host_id != self._host_id:
            counts = self._fetches.setdefault(node.source.host_id, self._new_counts())
            counts.fetched(self._clock.now(), keys)

    def _on_taken(self, holder: AttemptKey, keys: Sequence[BlockKey]) -> None:
        if holder.request_id.startswith(PREFIX):
            self._copies.made(self._clock.now(), keys)

    def _store_of(self, host: str) -> KvSource | None:
        stores = [n.source for n in self._nodes.values() if n.role is WorkerRole.STORE and n.source.host_id == host]
        return min(stores, key=lambda source: source.worker_id, default=None)

    async def _offer(self, plane: StorePlane, there: KvSource, keys: Sequence[BlockKey]) -> None:
        """A refusal, or a store that is gone, costs nothing: what stays hot is offered again."""
        for start in range(0, len(keys), HOLD_KEYS_MAX):
            self._count += 1
            source = plane.node.source()
            holder = AttemptKey(f"{PREFIX}{source.worker_id}/{source.epoch}.{self._count}", 1)
            records = await plane.exports.hold(holder, keys[start : start + HOLD_KEYS_MAX], LEASE_S)
            request = kv_pb2.OfferRequest(
                holder=key_to_pb(holder),
                epoch=there.epoch,
                layout=layout_to_pb(plane.layout),
                source=source_to_pb(source),
            )
            try:
                for (request.tenant, request.cost_s), theirs in _by_owner(plane, records).items():
                    del request.records[:]
                    request.records.extend(map(record_to_pb, theirs))
                    reply = await self._channels.stub(there).Offer(request, timeout=OFFER_TIMEOUT_S)
                    self.made += reply.taken
            except grpc.aio.AioRpcError as error:
                heed_cancellation()
                log.debug("no copies: %s", transfer_error(error, there.worker_id).message)
            finally:
                plane.exports.drop(holder)

    async def _give_up(self, plane: StorePlane, keys: Sequence[BlockKey]) -> None:
        """Only what somebody else has: a copy may have become the last one. What is held or pinned has its turn later.

        Raises DirectoryError, and TransferError when the disk does not answer; what is left then has its turn later too."""
        us = plane.node.source().worker_id
        waiting = deque(keys)
        try:
            while waiting:
                key = waiting[0]
                located = await self._directory.locate([key])
                elsewhere = any(holder.worker_id != us for held in located.holders for holder in held)
                if elsewhere and await self._store.evict([key]):
                    self.given_up += 1
                elif not elsewhere or _has(plane, key):
                    self._copies.made(self._clock.now(), [key])
                waiting.popleft()
        finally:  # a directory or a disk that fails now: else nobody would ever look at the rest again
            self._copies.made(self._clock.now(), waiting)


def _by_owner(plane: StorePlane, records: Sequence[BlockRecord]) -> dict[tuple[bytes, float], list[BlockRecord]]:
    """A copy is charged to whom the block is charged to, and weighs as much."""
    owners: dict[tuple[bytes, float], list[BlockRecord]] = {}
    for record in records:
        owner = plane.inventory.tenant_of(record.block_id), plane.inventory.cost_of(record.block_id)
        owners.setdefault(owner, []).append(record)
    return owners


def _has(plane: StorePlane, key: BlockKey) -> bool:
    [block] = plane.inventory.look([key])
    if block is not None:
        plane.inventory.release([block])
    return block is not None
