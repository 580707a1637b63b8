"""Sessions with the workers: one `Link` per incarnation of a worker, opened again while the view says that it lives."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, Protocol

import grpc

from core.errors import InvalidRequestError
from core.request import WorkerRole
from core.service import KEEPALIVE_OPTIONS
from core.wire import changes_from_pb, each_event
from router.codec import Addressed, command_to_pb, events_from_pb, follow_kv_to_pb, hello_to_pb, together
from router.events import Send
from router.kv_events import KvEvents
from router.view import ClusterView, WorkerView
from tandem.cancelling import heed_cancellation
from tandem.v1 import common_pb2 as pb
from tandem.v1.decode_pb2_grpc import DecodeStub
from tandem.v1.prefill_pb2_grpc import PrefillStub

log = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 5.0
BACKOFF_MIN_S = 0.05
BACKOFF_MAX_S = 2.0
OUT_QUEUE_MAX = 4096
FLUSH_TIMEOUT_S = 0.5
# A stopped worker must be noticed within a few seconds, sooner than the controller's own limit where that can be.
CHANNEL_OPTIONS: tuple[tuple[str, Any], ...] = (
    *((name, value) for name, value in KEEPALIVE_OPTIONS if not name.endswith(("_time_ms", "_timeout_ms"))),
    ("grpc.keepalive_time_ms", 2_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.ping_timeout_ms", 3_000),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.max_receive_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),  # a new session dials anew instead of waiting for another one's backoff
)


class Listener(Protocol):
    """Who hears of sessions; called on the asyncio thread, never waits."""

    def link_up(self, worker: str) -> None: ...

    def link_down(self, worker: str, reason: str) -> None:
        """Called once after each `link_up`: nothing sent on that session counts any more."""
        ...

    def heard(self, worker: str, events: Iterable[Addressed]) -> None: ...


class _BrokenError(Exception):
    """The session cannot go on; the text says why."""


class Link:
    """The session with one incarnation. `send` never waits; what does not fit breaks the session, for the peer is stuck."""

    def __init__(
        self,
        router_id: str,
        router_epoch: int,
        lease_s: float,
        worker: WorkerView,
        listener: Listener,
        kv_events: KvEvents | None = None,
        scope: str = "",
    ) -> None:
        self.worker = worker
        self.up = False
        self._scope = scope
        self._router_id = router_id
        self._router_epoch = router_epoch
        self._lease_s = lease_s
        self._listener = listener
        self._kv_events = kv_events
        self._out: deque[pb.SessionCommand] = deque()
        self._wake = asyncio.Event()
        self._flushed = asyncio.Event()
        self._call: Any = None
        self._task = asyncio.create_task(self._run(), name=f"link {worker.worker_id}@{worker.epoch}")

    def send(self, command: Send) -> None:
        """Queues a command of a session that is up."""
        assert self.up, "commands never name a lost worker"
        self._put(command_to_pb(command, self._scope))

    def _put(self, command: pb.SessionCommand) -> None:
        self._out.append(command)
        self._wake.set()
        self._flushed.clear()
        if len(self._out) == OUT_QUEUE_MAX:
            asyncio.get_running_loop().call_soon(self._down, "the worker does not read its commands")

    async def flushed(self) -> None:
        """What was queued so far has been written; at once when the session is not up."""
        if self.up:
            await self._flushed.wait()

    def retire(self, reason: str) -> asyncio.Task[None]:
        """Ends the session for good. The listener has heard of it when this returns; the caller keeps the task."""
        self._down(reason, logging.INFO)
        return asyncio.create_task(self._close(), name=f"retire {self.worker.worker_id}")

    async def _close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        pause_s = BACKOFF_MIN_S
        while True:
            reason = "the session ended"
            try:
                async with grpc.aio.insecure_channel(self.worker.address, options=CHANNEL_OPTIONS) as channel:
                    await self._session(channel)
            except grpc.aio.AioRpcError as error:
                reason = error.details() or error.code().name
            except (TimeoutError, _BrokenError) as error:
                reason = str(error) or "the worker did not answer the hello in time"
            except Exception:
                log.exception("the session with %s failed", self.worker.worker_id)
                reason = "the session failed here; the router's log says why"
            was_up = self.up
            self._down(reason)
            heed_cancellation()
            pause_s = BACKOFF_MIN_S if was_up else min(pause_s * 2, BACKOFF_MAX_S)
            await asyncio.sleep(pause_s)

    async def _session(self, channel: grpc.aio.Channel) -> None:
        make: Any = PrefillStub if self.worker.role is WorkerRole.PREFILL else DecodeStub
        call = self._call = make(channel).Session()
        try:
            events = aiter(call)
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                await call.write(hello_to_pb(self._router_id, self._router_epoch, self.worker.epoch, self._lease_s))
                first = await anext(events, None)
            if first is None:
                raise _BrokenError("the worker ended the session at once")
            if first.WhichOneof("event") != "hello" or first.hello.epoch != self.worker.epoch:
                raise _BrokenError(f"the worker is not epoch {self.worker.epoch} any more")
            self._came_up()
            await self._pump(call, events)
        except asyncio.CancelledError:
            heed_cancellation()
            raise _BrokenError("the session was broken off") from None  # the call was cancelled, not we
        finally:
            call.cancel()

    async def _pump(self, call: Any, events: AsyncIterator[pb.SessionEvent]) -> None:
        name, heard = self.worker.worker_id, self._listener.heard
        writer = asyncio.create_task(self._write(call), name=f"link write {name}")
        writer.add_done_callback(lambda _: call.cancel())  # a write that fails ends the reading too
        try:
            async for message in events:
                for event in each_event(message):
                    if event.WhichOneof("event") == "kv_changes":
                        self._heard_of_blocks(event.kv_changes)
                    else:
                        heard(name, events_from_pb(name, event, self._scope))
                    if not self.up:
                        return
        finally:
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)

    async def _write(self, call: Any) -> None:
        while True:
            while self._out:
                await call.write(together(self._out))
            self._flushed.set()
            self._wake.clear()
            await self._wake.wait()

    def _came_up(self) -> None:
        log.info("connected to %s (epoch %d)", self.worker.worker_id, self.worker.epoch)
        self._out.clear()
        self.up = True
        self._listener.link_up(self.worker.worker_id)
        if self._kv_events is not None:
            self._put(follow_kv_to_pb(self._kv_events.up(self.worker.worker_id)))

    def _heard_of_blocks(self, message: pb.KvChanges) -> None:
        if self._kv_events is None:
            return
        name = self.worker.worker_id
        try:
            again = self._kv_events.heard(name, changes_from_pb(message))
        except InvalidRequestError as error:
            log.warning("%s: %s", name, error.message)
            again = self._kv_events.broken(name)
        if again is not None:
            self._put(follow_kv_to_pb(again))

    def _down(self, reason: str, level: int = logging.WARNING) -> None:
        if self.up:
            log.log(level, "session with %s (epoch %d) over: %s", self.worker.worker_id, self.worker.epoch, reason)
            self.up = False
            self._out.clear()
            self._flushed.set()
            if self._call is not None:
                self._call.cancel()
            self._listener.link_down(self.worker.worker_id, reason)


class Links:
    """All sessions of this router. `follow(view)` opens and closes them. `kv_events`: who hears of the workers' blocks;
    `scope`: what sets this router's requests apart from those of others with the same ids (`codec.command_to_pb`)."""

    def __init__(
        self,
        router_id: str,
        router_epoch: int,
        lease_s: float,
        listener: Listener,
        kv_events: KvEvents | None = None,
        scope: str = "",
    ) -> None:
        self._make: Callable[[WorkerView], Link] = lambda worker: Link(
            router_id, router_epoch, lease_s, worker, listener, kv_events, scope
        )
        self._links: dict[str, Link] = {}
        self._retiring: set[asyncio.Task[None]] = set()

    def connected(self) -> frozenset[str]:
        return frozenset(name for name, link in self._links.items() if link.up)

    def send(self, command: Send) -> None:
        self._links[command.worker].send(command)

    def follow(self, view: ClusterView) -> None:
        """A worker that is dead or has another epoch or address is let go at once, before this returns.

        One that the view does not name keeps a session that stands: a controller that starts anew knows nobody yet.
        """
        wanted = {worker.worker_id: worker for worker in view.serving()}
        for name, link in list(self._links.items()):
            worker = wanted.get(name)
            unnamed = name not in view.workers and link.up
            if not unnamed and (worker is None or _incarnation(worker) != _incarnation(link.worker)):
                self._retire(name, "the cluster says it is gone" if worker is None else "it was replaced")
        for name, worker in wanted.items():
            if name in self._links:
                self._links[name].worker = worker
            else:
                self._links[name] = self._make(worker)

    async def close(self) -> None:
        """Lets what was queued (cancels, mostly) reach the workers, for a moment, and ends every session."""
        if self._links:
            flushes = [asyncio.create_task(link.flushed(), name="flush link") for link in self._links.values()]
            _, late = await asyncio.wait(flushes, timeout=FLUSH_TIMEOUT_S)
            for task in late:
                task.cancel()
        for name in list(self._links):
            self._retire(name, "the router stops")
        await asyncio.gather(*self._retiring, return_exceptions=True)

    def _retire(self, name: str, reason: str) -> None:
        task = self._links.pop(name).retire(reason)
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)


def _incarnation(worker: WorkerView) -> tuple[int, str]:
    """A change of role is none of it: the session stands, and what runs on it goes on."""
    return worker.epoch, worker.address
