"""Transport over torch.distributed point to point: `nccl` between GPUs, `gloo` without.

The source is asked over gRPC, where it checks what it always checks; the bytes come through a process group of two that
both ends have made for this pair of incarnations, keep, and use again. The groups live in helper processes: see
`collective_helper` for why. A group serves one pull at a time, so that one that is cancelled, late or fails takes no other
with it; pulls at the same time have a group each, up to a limit.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

import grpc

from core.blocks import BlockRecord, KvSource
from core.errors import DigestMismatchError, TransferError
from core.request import AttemptKey
from core.wire import key_to_pb
from kvtransfer.channels import Channels
from kvtransfer.codec import RAW
from kvtransfer.collective_helper import Helper
from kvtransfer.collective_orders import Join, Receive, Span
from kvtransfer.collective_pieces import cut
from kvtransfer.collective_service import COLLECT_BLOCKS_MAX
from kvtransfer.copier import settled
from kvtransfer.rpc import transfer_error
from kvtransfer.shared_arena import SharedArena
from kvtransfer.transport import BlocksGoneError, PullResult, check_places, check_request
from tandem.cancelling import heed_cancellation
from tandem.v1 import kv_pb2

GROUPS_PER_SOURCE = 4  # a pull that finds none free waits
SOURCES_MAX = 256  # incarnations with groups; the one unused longest goes for a new one
MEET_S = 10.0
WORDS_S = 1.0  # for the source to say why a group broke


class CollectiveTransport:
    """`dest` is an arena that the helper process can map."""

    name = "collective"

    def __init__(self, dest: SharedArena, channels: Channels, helper: Helper, *, digest: bool, timeout_s: float) -> None:
        self._arena = dest
        self._dest = dest.bytes_view()
        self._channels = channels
        self._helper = helper
        self._digest = digest
        self._timeout_s = timeout_s
        self._peers: dict[tuple[str, int], _Peer] = {}  # by (address, epoch), the one used last at the end
        self._dropping: set[asyncio.Task[None]] = set()
        self._closed = False

    async def pull(
        self, source: KvSource, key: AttemptKey, records: Sequence[BlockRecord], dest_blocks: Sequence[int], codec: str = RAW
    ) -> PullResult:
        """Blocks always travel raw: the link that collectives are for is quicker than a codec."""
        check_request(records, dest_blocks, self._dest)
        check_places(records, source.num_blocks)
        started = time.perf_counter()
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._pull(source, key, records, dest_blocks)
        except TimeoutError:
            raise TransferError(
                f"{source.worker_id} did not send {len(records)} blocks within {self._timeout_s:g} s;"
                " raise transfer.pull_timeout_s if the link is that slow"
            ) from None
        except grpc.aio.AioRpcError as error:
            heed_cancellation()
            raise transfer_error(error, source.worker_id) from None
        except asyncio.CancelledError:
            heed_cancellation()
            # Not we were cancelled, the channel was closed.
            raise TransferError(f"the connection to {source.worker_id} was closed") from None
        return PullResult(len(records) * int(self._dest.shape[1]), time.perf_counter() - started)

    def forget(self, source: KvSource) -> None:
        peer = self._peers.pop((source.grpc_address, source.epoch), None)
        if peer is not None:
            self._retire(peer)
        self._channels.forget(source)

    async def close(self) -> None:
        """The helper is its owner's to close, after this."""
        self._closed = True
        for peer in self._peers.values():
            self._retire(peer)
        self._peers.clear()
        if self._dropping:
            await asyncio.wait(self._dropping)

    async def _pull(
        self, source: KvSource, key: AttemptKey, records: Sequence[BlockRecord], dest_blocks: Sequence[int]
    ) -> None:
        if self._closed:
            raise TransferError("the transport is closed")
        peer = self._peer(source)
        async with peer.slots:
            for first in range(0, max(1, len(records)), COLLECT_BLOCKS_MAX):
                part = slice(first, first + COLLECT_BLOCKS_MAX)
                ask = _Ask(source, key, records[part], dest_blocks[part], int(self._dest.shape[1]))
                while not await self._collect(group := await self._group(peer, source), ask):
                    if not group.used:
                        raise TransferError(f"{source.worker_id} has lost a group at once that it had made")

    async def _group(self, peer: _Peer, source: KvSource) -> _Group:
        while peer.idle:
            group = peer.idle.pop()
            if self._helper.knows(group.name):
                return group
        name, timeout_s = uuid4().hex, min(MEET_S, self._timeout_s)
        request = kv_pb2.MeetRequest(epoch=source.epoch, group=name, backend=await self._helper.backend())
        reply = await self._channels.collective(source).Meet(request, timeout=timeout_s)
        await self._helper.make(Join(name, reply.store, timeout_s))
        return _Group(name, peer)

    async def _collect(self, group: _Group, ask: _Ask) -> bool:
        """False when the source does not know the group any more. A group that is not in step afterwards is dropped."""
        group.seq += 1
        # Asked and waited for at the same time: the first byte does not wait for a yes.
        call = self._channels.collective(ask.source).Collect(self._request(group, ask), timeout=self._timeout_s)
        receiving = asyncio.ensure_future(self._helper.move(self._order(group, ask)))
        in_step = False
        try:
            told, received = await self._both(call, receiving, ask)
            in_step = told.known
        finally:
            call.cancel()  # nothing once it has ended
            receiving.cancel()
            await settled(receiving)
            if in_step and not group.peer.retired:
                group.used = True
                group.peer.idle.append(group)
            else:
                await settled(asyncio.ensure_future(self._helper.drop(group.name)))
        if not told.known:
            return False
        if told.gone:  # said first: bytes of a later owner are not corrupted, they are another's
            raise ask.gone(told.gone)
        if received["corrupted"] is not None:
            raise DigestMismatchError(received["corrupted"])
        return True

    async def _both(self, call: Any, receiving: asyncio.Future[Any], ask: _Ask) -> tuple[kv_pb2.CollectReply, Any]:
        """What the source says and what arrived. Its words count first: they say why nothing came."""
        telling = asyncio.ensure_future(_answer(call))
        try:
            await asyncio.wait((receiving, telling), return_when=asyncio.FIRST_EXCEPTION)
            if not telling.done():
                await asyncio.wait([telling], timeout=WORDS_S)
            if not telling.done():
                raise TransferError(f"{ask.source.worker_id}: {receiving.exception()}")
            told = telling.result()
            return told, await receiving if told.known else None
        except grpc.aio.AioRpcError as error:
            refusal = transfer_error(error, ask.source.worker_id)
            if isinstance(refusal, BlocksGoneError):  # which names places in the request
                raise ask.gone(refusal.indices) from None
            raise
        finally:
            telling.cancel()
            await settled(telling)

    def _request(self, group: _Group, ask: _Ask) -> kv_pb2.CollectRequest:
        return kv_pb2.CollectRequest(
            group=group.name,
            seq=group.seq,
            key=key_to_pb(ask.key),
            epoch=ask.source.epoch,
            block_bytes=int(self._dest.shape[1]),
            block_ids=ask.block_ids,
            generations=[record.generation for record in ask.records],
            piece_blocks=ask.pieces,
        )

    def _order(self, group: _Group, ask: _Ask) -> Receive:
        span = Span(self._arena.path, self._arena.epoch, list(ask.dest_blocks), ask.pieces)
        digests = [record.digest for record in ask.records] if self._digest else []
        # The pull's own timeout comes first; this one is for when nobody is there any more to see to it.
        return Receive(group.name, group.seq, span, [record.index for record in ask.records], digests, self._timeout_s + 1.0)

    def _peer(self, source: KvSource) -> _Peer:
        place = (source.grpc_address, source.epoch)
        peer = self._peers.pop(place) if place in self._peers else _Peer()
        self._peers[place] = peer
        while len(self._peers) > SOURCES_MAX:
            self._retire(self._peers.pop(next(iter(self._peers))))
        return peer

    def _retire(self, peer: _Peer) -> None:
        peer.retired = True
        for group in peer.idle:
            task = asyncio.create_task(self._helper.drop(group.name), name=f"kv-group-drop {group.name[:8]}")
            self._dropping.add(task)
            task.add_done_callback(self._dropping.discard)
        peer.idle.clear()


async def _answer(call: Any) -> kv_pb2.CollectReply:
    reply: kv_pb2.CollectReply = await call
    return reply


class _Ask:
    """One request to one source: at most COLLECT_BLOCKS_MAX blocks."""

    def __init__(
        self,
        source: KvSource,
        key: AttemptKey,
        records: Sequence[BlockRecord],
        dest_blocks: Sequence[int],
        block_bytes: int,
    ) -> None:
        self.source = source
        self.key = key
        self.records = records
        self.dest_blocks = dest_blocks
        self.block_ids = [record.block_id for record in records]
        self.pieces = cut(self.block_ids, dest_blocks, block_bytes)

    def gone(self, places: Sequence[int]) -> BlocksGoneError:
        return BlocksGoneError([self.records[place].index for place in places if place < len(self.records)])


class _Group:
    """`used`: it has served a request, so that the other end may have dropped it since."""

    def __init__(self, name: str, peer: _Peer) -> None:
        self.name = name
        self.peer = peer
        self.seq = 0
        self.used = False


class _Peer:
    """One incarnation of a source: its groups that nobody uses now, and how many may be in use."""

    def __init__(self) -> None:
        self.slots = asyncio.Semaphore(GROUPS_PER_SOURCE)
        self.idle: deque[_Group] = deque()
        self.retired = False
