"""The one implementation of `Session`, behind both worker services: hellos, commands in, events out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Protocol

import grpc

from core.errors import InternalError, InvalidRequestError, StaleEpochError, TandemError
from core.request import AttemptKey
from core.wire import each_command
from tandem.v1 import common_pb2 as pb
from worker.attempts import Peer
from worker.codec import command_from_pb, event_to_pb, events_to_pb, key_of
from worker.kv_feeds import KvFeeds
from worker.links import RouterLinks
from worker.messages import (
    AttemptFailed,
    CancelAttempt,
    Command,
    FollowKv,
    GenerateLocal,
    Hello,
    OpenHandoff,
    Opening,
    Reserve,
    Reserved,
    StartPrefill,
)
from worker.outbox import Outbox

log = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 10.0
SLOW_ROUTER_S = 15.0
SESSION_LEASE_MAX_S = 300.0
Context = grpc.aio.ServicerContext[pb.SessionCommand, pb.SessionEvent]


class Handler(Protocol):
    """What commands do at one role. Called on the asyncio thread and never waits; raises TandemError to fail the attempt."""

    def open(self, command: Opening) -> None:
        """Begin an attempt that was admitted just now."""
        ...

    def open_handoff(self, command: OpenHandoff) -> None: ...

    def cancel(self, key: AttemptKey) -> None:
        """Free everything an attempt holds here. Idempotent, never raises, says nothing to the router."""
        ...


class SessionServicer:
    """Serves routers. An attempt outlives its session by the lease of the hello, see RouterLinks."""

    def __init__(
        self,
        worker_id: str,
        epoch: int,
        links: RouterLinks,
        handler: Handler,
        kv: KvFeeds | None = None,
        *,
        slow_router_s: float = SLOW_ROUTER_S,
    ) -> None:
        self._hello = Hello(worker_id, epoch)
        self._links = links
        self._handler = handler
        self._kv = kv
        self._slow_router_s = slow_router_s

    async def Session(self, requests: AsyncIterator[pb.SessionCommand], context: Context) -> None:
        hello = await self._greet(requests, context)
        peer = Peer(hello.peer_id, hello.epoch)
        outbox = self._links.attach(peer, min(hello.lease_s, SESSION_LEASE_MAX_S))
        log.info("router %s (epoch %d) connected", *peer)
        pair = (
            asyncio.create_task(self._read(requests, peer), name=f"session-read {peer.peer_id}"),
            asyncio.create_task(self._write(outbox, context), name=f"session-write {peer.peer_id}"),
        )
        slow = False
        try:
            done, _ = await asyncio.wait(pair, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                await task
        except TimeoutError:
            slow = True
        finally:
            for task in pair:
                task.cancel()
            self._links.detach(peer, outbox)  # before anything is awaited: a cancellation may come even now
            await asyncio.gather(*pair, return_exceptions=True)
            log.info("the session of router %s ended", peer.peer_id)
        if slow:  # the abort itself waits behind what the router does not read: everything else is settled by now
            log.warning("router %s read nothing for %g s, so its session ended", peer.peer_id, self._slow_router_s)
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, f"nothing was read for {self._slow_router_s:g} s")

    async def _greet(self, requests: AsyncIterator[pb.SessionCommand], context: Context) -> Hello:
        """Exchanges hellos. Refuses a router that looks for another incarnation of this worker."""
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                first = command_from_pb(await anext(requests))
        except (TimeoutError, StopAsyncIteration, InvalidRequestError):
            first = None
        if not isinstance(first, Hello) or not first.peer_id:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first command of a session is a hello with a peer_id")
            raise AssertionError("abort raises")
        if first.expected_epoch != self._hello.epoch:
            error = StaleEpochError(f"this is epoch {self._hello.epoch} of the worker, not {first.expected_epoch}")
            context.set_trailing_metadata((("tandem-code", error.code),))
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, error.message)
        await context.write(event_to_pb(self._hello))
        return first

    async def _read(self, requests: AsyncIterator[pb.SessionCommand], peer: Peer) -> None:
        async for message in requests:
            for command in each_command(message):
                self._heed(command, peer)

    def _heed(self, message: pb.SessionCommand, peer: Peer) -> None:
        """One command; what is wrong with it is nobody else's trouble."""
        key = key_of(message)
        try:
            self._dispatch(command_from_pb(message), peer)
        except TandemError as error:
            self._fail(key, peer, error)
        except Exception:
            log.exception("a command for %s failed", key)
            self._fail(key, peer, InternalError("the worker failed on this command; its log says why"))

    async def _write(self, outbox: Outbox, context: Context) -> None:
        while events := await outbox.head():
            async with asyncio.timeout(self._slow_router_s):
                await context.write(events_to_pb(events))
            outbox.advance(len(events))

    def _dispatch(self, command: Command, peer: Peer) -> None:
        match command:
            case CancelAttempt(key):
                self._links.cancel(key)
            case OpenHandoff(key):
                if self._links.table.owner(key) == peer:
                    self._handler.open_handoff(command)
                else:
                    self._links.reply(peer, AttemptFailed(key, "unavailable", "nothing is reserved for this attempt", True))
            case StartPrefill() | Reserve() | GenerateLocal():
                self._open(command, peer)
            case FollowKv(stream):
                if self._kv is not None:
                    self._kv.follow(peer, stream)
            case Hello():
                raise InvalidRequestError("a session has one hello, its first command")

    def _open(self, command: Opening, peer: Peer) -> None:
        refused = self._links.admit(command.key, peer)
        if refused is None:
            self._handler.open(command)
        elif isinstance(command, Reserve):
            self._links.reply(peer, Reserved(command.key, granted=False, reason=refused.reason))
        else:
            self._links.reply(peer, AttemptFailed(command.key, "unavailable", refused.reason, retryable=True))

    def _fail(self, key: AttemptKey | None, peer: Peer, error: TandemError) -> None:
        """Answers a command that could not be carried out; whatever the attempt held here is freed."""
        if key is None:
            log.warning("router %s sent a command that cannot be used: %s", peer.peer_id, error.message)
        elif self._links.table.owner(key) == peer:
            self._links.fail(key, error)
            self._handler.cancel(key)
        else:
            self._links.reply(peer, AttemptFailed(key, error.code, error.message, error.retryable))
