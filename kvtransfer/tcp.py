"""Transport between hosts over raw sockets: several connections per source, bytes received straight into their blocks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from core.blocks import BlockRecord, KvSource
from core.errors import TransferError
from core.request import AttemptKey
from kvtransfer.arena import Blocks
from kvtransfer.codec import RAW
from kvtransfer.codecs import Codecs
from kvtransfer.copier import settled
from kvtransfer.tcp_lane import Job, Lane
from kvtransfer.tcp_wire import Security
from kvtransfer.transport import PullResult, check_places, check_request

LANES_MAX = 8  # connections to one source; a pull that finds none free waits
SOURCES_MAX = 256  # incarnations with connections open; the one unused longest goes for a new one
_THREADS = 16


class TcpTransport:
    """`connections`: how many of them one pull uses when it is large enough."""

    name = "tcp"

    def __init__(
        self,
        dest: Blocks,
        *,
        digest: bool,
        timeout_s: float,
        connections: int = 2,
        security: Security | None = None,
        codecs: Codecs | None = None,
    ) -> None:
        self._dest = dest
        self._codecs = codecs or Codecs()
        self._digest = digest
        self._timeout_s = timeout_s
        self._connections = connections
        self._security = security or Security()
        self._peers: dict[tuple[str, int], _Peer] = {}  # by (address, epoch), the one used last at the end
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="kv-tcp")

    async def pull(
        self, source: KvSource, key: AttemptKey, records: Sequence[BlockRecord], dest_blocks: Sequence[int], codec: str = RAW
    ) -> PullResult:
        check_request(records, dest_blocks, self._dest)
        check_places(records, source.num_blocks)
        if not source.tcp_address:
            raise TransferError(f"{source.worker_id} does not serve blocks over tcp")
        started = time.perf_counter()
        job = Job(
            source,
            key,
            records,
            dest_blocks,
            self._dest,
            digest=self._digest,
            timeout_s=self._timeout_s,
            lanes_max=self._connections,
            codec=self._codecs.find(codec),
        )
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._run(self._peer(source), job)
        except TimeoutError:
            raise TransferError(
                f"{source.worker_id} did not send {len(records)} blocks within {self._timeout_s:g} s;"
                " raise transfer.pull_timeout_s if the link is that slow"
            ) from None
        size = len(records) * int(self._dest.shape[1])
        return PullResult(size, time.perf_counter() - started, codec, job.encoded_bytes)

    def forget(self, source: KvSource) -> None:
        peer = self._peers.pop((source.tcp_address, source.epoch), None)
        if peer is not None:
            peer.retire()

    async def close(self) -> None:
        for peer in self._peers.values():
            peer.retire()
            peer.abort()
        self._peers.clear()
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _run(self, peer: _Peer, job: Job) -> None:
        """Comes back, however it ends, only when no thread writes any more."""
        lanes = await peer.lanes(job.num_lanes)
        running: list[Future[None]] = []
        waiting: list[asyncio.Future[None]] = []
        try:
            for lane in lanes:
                running.append(self._pool.submit(lane.work, job))
                waiting.append(asyncio.wrap_future(running[-1]))
            await asyncio.wait(waiting, return_when=asyncio.FIRST_EXCEPTION)
        except RuntimeError:
            job.fail(TransferError("the transport is closed"))
        finally:
            if len(running) < len(lanes) or not all(future.done() and not future.cancelled() for future in running):
                job.fail(TransferError("the pull was given up"))
            if job.error is not None:
                for lane in lanes:
                    lane.abort()
                for future in running:
                    future.cancel()  # when no thread has begun with it
            try:
                await settled(*waiting)
            finally:
                for lane in lanes:
                    peer.give_back(lane, whole=job.error is None)
        if job.error is not None:
            raise job.error

    def _peer(self, source: KvSource) -> _Peer:
        place = (source.tcp_address, source.epoch)
        peer = self._peers.pop(place, None) or _Peer(source, self._security, self._timeout_s, self._connections)
        self._peers[place] = peer
        while len(self._peers) > SOURCES_MAX:
            self._peers.pop(next(iter(self._peers))).retire()
        return peer


class _Peer:
    """The connections to one incarnation of a source. Used on the event loop only."""

    def __init__(self, source: KvSource, security: Security, timeout_s: float, idle_max: int) -> None:
        self._source = source
        self._security = security
        self._timeout_s = timeout_s
        self._idle_max = idle_max
        self._idle: list[Lane] = []
        self._busy: set[Lane] = set()
        self._free = asyncio.Semaphore(LANES_MAX)
        self._retired = False

    async def lanes(self, wanted: int) -> list[Lane]:
        """At least one, as soon as one is free; up to `wanted` when nobody else waits for them."""
        await self._free.acquire()
        taken = [self._lane()]
        while len(taken) < wanted and not self._free.locked():
            await self._free.acquire()  # at once, and without giving way to anybody
            taken.append(self._lane())
        return taken

    def give_back(self, lane: Lane, *, whole: bool) -> None:
        """`whole`: every answer it asked for has been read."""
        self._busy.discard(lane)
        self._free.release()
        if whole and not self._retired and len(self._idle) < self._idle_max:
            self._idle.append(lane)
        else:
            lane.close()

    def retire(self) -> None:
        """No new use: idle connections are closed now, the others when they are given back."""
        self._retired = True
        for lane in self._idle:
            lane.close()
        self._idle.clear()

    def abort(self) -> None:
        for lane in self._busy:
            lane.abort()

    def _lane(self) -> Lane:
        lane = None
        while self._idle and lane is None:
            lane = self._idle.pop()
            if not lane.usable():
                lane.close()
                lane = None
        lane = lane or Lane(self._source, self._security, self._timeout_s)
        self._busy.add(lane)
        return lane
