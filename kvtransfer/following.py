"""The puller's end of one Follow stream: hears of blocks, keeps the lease alive, comes again when the line breaks."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import Protocol

import grpc

from core.blocks import BlockRecord, Closing, KvTicket
from core.clock import Clock
from core.errors import LeaseExpiredError, TransferError
from core.wire import closing_from_pb, key_to_pb, record_from_pb
from kvtransfer.channels import Channels
from kvtransfer.rpc import is_transient, transfer_error
from kvtransfer.steady_call import SteadyCall
from tandem.cancelling import heed_cancellation
from tandem.errors import InvalidRequestError
from tandem.v1 import kv_pb2

log = logging.getLogger(__name__)

RECONNECTS_MAX = 3  # in a row, without a word from the source in between
RECONNECT_PAUSE_S = 0.1
FINISH_TIMEOUT_S = 1.0


class Listener(Protocol):
    """Who is told what the source says. May raise TransferError: the hand-off has failed then."""

    def announced(self, records: list[BlockRecord]) -> None: ...

    def closed(self, closing: Closing) -> None: ...


class SourceGoneError(TransferError):
    """The source cannot be reached at all: what is cached of it can be dropped."""

    code = "source_gone"


class Following:
    """`run` and `keep` are to be run side by side, in tasks; each ends only by raising, or by being cancelled.

    The lease counts from the moment a renewal was *sent*, and only once the source answered it, shortened by the margin:
    so this end never believes in a lease for longer than the other one keeps it, whatever the line does.
    """

    def __init__(
        self, channels: Channels, ticket: KvTicket, listener: Listener, clock: Clock, *, puller_id: str, lease_margin_s: float
    ) -> None:
        self._channels = channels
        self._ticket = ticket
        self._listener = listener
        self._clock = clock
        self._puller_id = puller_id
        self._lease_s = max(ticket.lease_s - lease_margin_s, ticket.lease_s / 2)
        self._until = clock.now() + self._lease_s  # the ticket itself promises the first one
        self._sent_at: deque[float] = deque()  # openings and renewals not answered yet
        self._renew_at = clock.now() + ticket.lease_s / 3
        self._call: SteadyCall | None = None
        self._heard = False

    async def run(self) -> None:
        """Listens, again after a broken line. Raises TransferError or a child when the source ends it or is gone."""
        failures = 0
        while True:
            try:
                await self._listen()
            except grpc.aio.AioRpcError as error:
                heed_cancellation()
                failures = 1 if self._heard else failures + 1
                if not is_transient(error):
                    raise transfer_error(error, self._ticket.source.worker_id) from None
                if failures > RECONNECTS_MAX:
                    raise SourceGoneError(f"{self._ticket.source.worker_id} is gone: {error.details()}") from None
                log.info("lost the line to %s (%s); following again", self._ticket.source.worker_id, error.details())
            await asyncio.sleep(RECONNECT_PAUSE_S * failures)

    async def keep(self) -> None:
        """Renews at a third of the lease. Raises LeaseExpiredError when the source did not answer for a whole one."""
        while True:
            now = self._clock.now()
            if now >= self._until:
                source = self._ticket.source.worker_id
                raise LeaseExpiredError(f"{source} has not renewed the lease of {self._ticket.key} for {self._lease_s:g} s")
            if now >= self._renew_at:
                await self._renew(now)
            await asyncio.sleep(max(0.0, min(self._renew_at, self._until) - self._clock.now()))

    async def finish(self) -> None:
        """Tells the source that nothing more is wanted, as well as that can be done. To be called once, after the tasks."""
        call, self._call = self._call, None
        if call is not None and not await call.farewell(kv_pb2.FollowRequest(done=kv_pb2.FollowDone()), FINISH_TIMEOUT_S):
            log.info(
                "%s may not have heard that %s is done; its lease runs out", self._ticket.source.worker_id, self._ticket.key
            )

    async def _listen(self) -> None:
        """Until the line breaks. Cancelled or failed by what was said, the call stays for `finish`."""
        call = self._call = SteadyCall(self._channels.stub(self._ticket.source).Follow())
        opening = kv_pb2.FollowOpen(key=key_to_pb(self._ticket.key), epoch=self._ticket.source.epoch, puller_id=self._puller_id)
        self._heard = False
        self._sent_at = deque([self._clock.now()])
        try:
            await call.write(kv_pb2.FollowRequest(open=opening))
            while (message := await call.read()) is not None:
                self._heard = True
                self._dispatch(message)
        except grpc.aio.AioRpcError:
            self._call = None
            await call.abandon()
            raise
        raise TransferError(f"{self._ticket.source.worker_id} ended the hand-off of {self._ticket.key}")

    def _dispatch(self, message: kv_pb2.Announcement) -> None:
        if message.blocks.blocks:
            self._listener.announced(_records(message.blocks))
        elif message.HasField("blocks") and self._sent_at:
            self._until = max(self._until, self._sent_at.popleft() + self._lease_s)
        if message.HasField("closing"):
            self._listener.closed(closing_from_pb(message.closing))
        if message.HasField("revoked"):
            raise TransferError(f"{self._ticket.source.worker_id} took {self._ticket.key} back: {message.revoked.reason}")

    async def _renew(self, now: float) -> None:
        self._renew_at = now + self._ticket.lease_s / 3
        if self._call is None:
            return
        self._sent_at.append(now)
        try:
            async with asyncio.timeout(max(0.0, self._until - now)):
                await self._call.write(kv_pb2.FollowRequest(renew=kv_pb2.FollowRenew()))
        except (TimeoutError, grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # `run` hears of a broken line itself; a stuck one ends with the lease


def _records(message: kv_pb2.AnnouncedBlocks) -> list[BlockRecord]:
    try:
        return [record_from_pb(block) for block in message.blocks]
    except InvalidRequestError as error:
        raise TransferError(f"the source announced a block that cannot be: {error.message}") from None
