"""A bidirectional call that outlives the cancellation of its users, so that a farewell can still be said."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from core.errors import TransferError
from tandem.v1 import kv_pb2


class SteadyCall:
    """In grpc.aio, cancelling a read or a write cancels the whole call. Here they are shielded and go on in the background.

    One reader and any number of writers. Whoever makes one ends it, with `farewell` or `abandon`.
    """

    def __init__(self, call: grpc.aio.StreamStreamCall[kv_pb2.FollowRequest, kv_pb2.Announcement]) -> None:
        self._call = call
        self._reading: asyncio.Future[Any] | None = None
        self._writing: asyncio.Future[None] | None = None

    async def read(self) -> kv_pb2.Announcement | None:
        """The next message, None at the end of the stream. Raises AioRpcError."""
        reading = self._reading = self._reading or asyncio.ensure_future(self._call.read())
        try:
            message = await asyncio.shield(reading)
        except asyncio.CancelledError:
            if reading.cancelled():  # not we were cancelled, the channel was closed
                raise TransferError("the connection to the source was closed") from None
            raise
        finally:
            if reading.done():
                self._reading = None
        return None if message is grpc.aio.EOF else message  # type: ignore[attr-defined]

    async def write(self, request: kv_pb2.FollowRequest) -> None:
        """Raises AioRpcError, or InvalidStateError when the call is over."""
        while self._writing is not None and not self._writing.done():
            await asyncio.wait([self._writing])
        writing = self._writing = asyncio.ensure_future(self._call.write(request))
        await asyncio.shield(writing)

    async def farewell(self, last: kv_pb2.FollowRequest, timeout_s: float) -> bool:
        """Writes `last` and waits until the peer has ended the stream. False when it cannot be known that it heard."""
        try:
            async with asyncio.timeout(timeout_s):
                await self.write(last)
                await self._call.done_writing()
                while await self.read() is not None:
                    pass  # what was on its way
        except (TimeoutError, TransferError, grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return False
        finally:
            await self.abandon()
        return True

    async def abandon(self) -> None:
        """Cancels the call. Idempotent."""
        self._call.cancel()
        for left in (self._reading, self._writing):
            if left is not None:
                await asyncio.wait([left])
                if not left.cancelled():
                    left.exception()  # a failure of a call nobody wants any more
        self._reading = self._writing = None
