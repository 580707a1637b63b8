"""The Kv service: followers hear of blocks as they are committed, and read their bytes where nothing faster reaches."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator, Sequence

import grpc

from core.blocks import BlockRecord
from core.errors import InvalidRequestError, LeaseExpiredError
from core.wire import closing_to_pb, key_from_pb, record_to_pb
from kvtransfer.codec import RAW
from kvtransfer.exports import Exports
from kvtransfer.follower import Follower
from kvtransfer.handoff import ExportState, News
from kvtransfer.reading import Asked, read_encoded, read_spans
from kvtransfer.rpc import abort
from tandem.errors import TandemError
from tandem.v1 import kv_pb2, kv_pb2_grpc

log = logging.getLogger(__name__)

READ_BLOCKS_MAX = 2048  # of one Read; a puller that wants more asks again
RECORDS_PER_MESSAGE = 1024
OPEN_TIMEOUT_S = 10.0

_Requests = AsyncIterator[kv_pb2.FollowRequest]
_FollowContext = grpc.aio.ServicerContext[kv_pb2.FollowRequest, kv_pb2.Announcement]
_ReadContext = grpc.aio.ServicerContext[kv_pb2.ReadRequest, kv_pb2.ReadChunk]


class KvServicer(kv_pb2_grpc.KvServicer):
    """Follow and Read. `exports`: None while there is no memory yet that could be read."""

    def __init__(self, exports: Exports | None) -> None:
        self.exports = exports

    @property
    def _exports(self) -> Exports:
        if self.exports is None:
            raise LeaseExpiredError("nothing is on offer here: this node has not seen a block yet")
        return self.exports

    async def Follow(self, request_iterator: _Requests, context: _FollowContext) -> None:
        """Written with `context.write`, not `yield`: an async generator must not be suspended inside a task group."""
        try:
            follower = await self._opened(request_iterator)
        except TandemError as error:
            await abort(context, error)
        try:
            async with asyncio.TaskGroup() as group:
                listening = group.create_task(self._listen(request_iterator, follower), name="kv-follow-listen")
                await self._tell(follower, context)
                listening.cancel()
        except* _FollowerGone:
            log.info("the follower of %s went away; its lease runs on", follower.export.key)
        finally:
            self._exports.unfollow(follower)

    async def Read(self, request: kv_pb2.ReadRequest, context: _ReadContext) -> AsyncIterator[kv_pb2.ReadChunk | bytes]:
        try:
            asked = self._readable(request, context)
            codec = self._exports.codecs.find(request.codec or RAW)
            if codec is None:
                for chunk in read_spans(self._exports.arena, asked):
                    yield chunk
                return
            async for encoded in read_encoded(self._exports.arena, asked, codec):
                yield encoded
        except TandemError as error:
            await abort(context, error)

    async def _opened(self, requests: _Requests) -> Follower:
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                first = await anext(requests, None)
        except TimeoutError:
            first = None
        if first is None or first.WhichOneof("request") != "open":
            raise InvalidRequestError("a Follow stream begins with `open`")
        return self._exports.follow(key_from_pb(first.open.key), first.open.epoch)

    async def _listen(self, requests: _Requests, follower: Follower) -> None:
        """Until the follower is done; raises _FollowerGone when it hangs up before."""
        key = follower.export.key
        async for request in requests:
            match request.WhichOneof("request"):
                case "renew":
                    if self._exports.renew(key):
                        follower.renewed()
                case "done":
                    self._exports.done(key)
                    follower.wake()
                    return
                case other:
                    log.warning("a follower of %s sent %s; ignored", key, other)
        raise _FollowerGone

    async def _tell(self, follower: Follower, context: _FollowContext) -> None:
        """Writes what there is to hear until the export ends. An empty message answers the opening and each renewal."""
        await context.write(_blocks(()))
        while True:
            news, renewals = await follower.news()  # the lease is the deadline: an export nobody renews ends
            if follower.export.state is ExportState.DONE:
                return
            try:
                async with asyncio.timeout(follower.export.lease_s):
                    for message in _messages(news, renewals):
                        await context.write(message)
            except TimeoutError:
                raise _FollowerGone from None  # it reads nothing
            if news.ended is not None:
                return

    def _readable(self, request: kv_pb2.ReadRequest, context: _ReadContext) -> Asked:
        if context.time_remaining() is None:
            raise InvalidRequestError("Read needs a deadline; set one on the call")
        if len(request.block_ids) > READ_BLOCKS_MAX:
            raise InvalidRequestError(f"{len(request.block_ids)} blocks in one Read; ask for at most {READ_BLOCKS_MAX}")
        columns = (request.indices, request.block_ids, request.generations, request.digests)
        asked = Asked(*(list(column) for column in columns))
        if request.codec not in ("", RAW) and len(asked.digests) < len(asked):
            raise InvalidRequestError("a Read through a codec tells the digest of each block")
        places = list(zip(asked.block_ids, asked.generations, strict=True))
        self._exports.check_readable(key_from_pb(request.key), request.epoch, places)
        return asked


class _FollowerGone(Exception):
    """The stream ended without a `done`; the follower may come again."""


def _messages(news: News, renewals: int) -> Iterator[kv_pb2.Announcement]:
    for _ in range(renewals):
        yield _blocks(())
    told = [_blocks(news.records[at : at + RECORDS_PER_MESSAGE]) for at in range(0, len(news.records), RECORDS_PER_MESSAGE)]
    if news.closing is not None or news.ended is not None:
        last = told[-1] if told else kv_pb2.Announcement()  # in the same message: decode waits for it
        told[-1:] = [last]
        if news.closing is not None:
            last.closing.CopyFrom(closing_to_pb(news.closing))
        if news.ended is not None:
            last.revoked.reason = news.ended
    yield from told


def _blocks(records: Sequence[BlockRecord]) -> kv_pb2.Announcement:
    return kv_pb2.Announcement(blocks=kv_pb2.AnnouncedBlocks(blocks=[record_to_pb(record) for record in records]))
