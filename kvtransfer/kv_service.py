"""The Kv service of any node: hand-offs as in `service`, and reading by key. Messages to values and back, nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

import grpc

from core.blocks import BlockKey, KvLayout
from core.request import AttemptKey
from core.wire import key_from_pb, layout_from_pb, layout_to_pb, record_to_pb, role_to_pb, source_to_pb
from kvtransfer.directory import Tier
from kvtransfer.exports import Exports
from kvtransfer.holds import check_keys
from kvtransfer.kv_node import Held, NodeEntry, NodeStat, Pinned, TierStat, Verified
from kvtransfer.rpc import abort
from kvtransfer.service import KvServicer
from tandem.errors import InvalidRequestError, TandemError
from tandem.v1 import kv_pb2

ENTRIES_PER_MESSAGE = 1024
_TIER = {Tier.DRAM: kv_pb2.TIER_DRAM, Tier.DISK: kv_pb2.TIER_DISK}

_Context = grpc.aio.ServicerContext[Any, Any]


class Node(Protocol):
    """What the service asks of a node; see `kv_node.KvNode`."""

    async def hold(
        self, holder: AttemptKey, epoch: int, layout: KvLayout, keys: Sequence[BlockKey], lease_s: float
    ) -> Held: ...

    def drop(self, holder: AttemptKey, epoch: int) -> bool: ...

    def stat(self) -> NodeStat: ...

    def entries(self) -> list[NodeEntry]: ...

    async def verify(self, keys: Sequence[BlockKey]) -> Verified: ...

    async def evict(self, keys: Sequence[BlockKey] | None) -> int: ...

    async def pin(self, keys: Sequence[BlockKey]) -> Pinned: ...

    def unpin(self, keys: Sequence[BlockKey] | None) -> Pinned: ...


class KvNodeServicer(KvServicer):
    """Registered as `tandem.v1.Kv`. Every refusal says why in its details."""

    def __init__(self, exports: Exports | None, node: Node) -> None:
        super().__init__(exports)
        self._node = node

    async def Hold(self, request: kv_pb2.HoldRequest, context: _Context) -> kv_pb2.HoldReply:
        try:
            held = await self._node.hold(
                key_from_pb(request.holder), request.epoch, layout_from_pb(request.layout), request.keys, request.lease_s
            )
        except TandemError as error:
            await abort(context, error)
        return kv_pb2.HoldReply(
            records=[record_to_pb(record) for record in held.records],
            source=source_to_pb(held.source),
            lease_s=held.lease_s,
            promoted=held.promoted,
        )

    async def Drop(self, request: kv_pb2.DropRequest, context: _Context) -> kv_pb2.DropReply:
        try:
            return kv_pb2.DropReply(found=self._node.drop(key_from_pb(request.holder), request.epoch))
        except TandemError as error:
            await abort(context, error)

    async def Stat(self, request: kv_pb2.StatRequest, context: _Context) -> kv_pb2.StatReply:
        stat = self._node.stat()
        reply = kv_pb2.StatReply(
            worker_id=stat.worker_id,
            epoch=stat.epoch,
            role=role_to_pb(stat.role),
            tiers=[_tier_to_pb(tier) for tier in stat.tiers],
            leases_open=stat.leases_open,
            policy=stat.policy,
            digest_failures=stat.digest_failures,
        )
        if stat.layout is not None:
            reply.layout.CopyFrom(layout_to_pb(stat.layout))
        return reply

    async def List(self, request: kv_pb2.ListRequest, context: _Context) -> AsyncIterator[kv_pb2.ListReply]:
        entries = self._node.entries()
        if request.limit:
            del entries[request.limit :]
        for start in range(0, len(entries), ENTRIES_PER_MESSAGE):
            yield kv_pb2.ListReply(entries=[_entry_to_pb(e) for e in entries[start : start + ENTRIES_PER_MESSAGE]])

    async def Verify(self, request: kv_pb2.VerifyRequest, context: _Context) -> kv_pb2.VerifyReply:
        try:
            check_keys(request.keys)
            verified = await self._node.verify(request.keys)
        except TandemError as error:
            await abort(context, error)
        return kv_pb2.VerifyReply(checked=verified.checked, dropped=verified.dropped)

    async def Evict(self, request: kv_pb2.EvictRequest, context: _Context) -> kv_pb2.EvictReply:
        try:
            check_keys(request.keys)
            evicted = await self._node.evict(None if request.all else request.keys)
        except TandemError as error:
            await abort(context, error)
        return kv_pb2.EvictReply(evicted=evicted)

    async def Pin(self, request: kv_pb2.PinRequest, context: _Context) -> kv_pb2.PinReply:
        try:
            check_keys(request.keys)
            if request.all and not request.unpin:
                raise InvalidRequestError("all that is pinned can be unpinned; name the keys to pin")
            if request.unpin:
                pinned = self._node.unpin(None if request.all else request.keys)
            else:
                pinned = await self._node.pin(request.keys)
        except TandemError as error:
            await abort(context, error)
        return kv_pb2.PinReply(**pinned._asdict())


def _entry_to_pb(entry: NodeEntry) -> kv_pb2.BlockEntry:
    return kv_pb2.BlockEntry(
        key=entry.key,
        tier=_TIER[entry.tier],
        bytes=entry.block_bytes,
        hits=entry.hits,
        tenant=entry.tenant,
        pinned=entry.pinned,
        digest=entry.digest,
        cost_s=entry.cost_s,
        age_s=entry.age_s,
        idle_s=entry.idle_s,
    )


def _tier_to_pb(stat: TierStat) -> kv_pb2.TierStat:
    return kv_pb2.TierStat(**{**stat._asdict(), "tier": _TIER[stat.tier]})
