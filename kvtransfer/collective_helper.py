"""A worker's hold on the process that has its groups.

Why a process and not threads of the worker. In-process, gloo keeps its timeouts and lets go of the interpreter lock, so a
survivor would not hang. But one message longer than the tensor that waits for it ends the whole process, by `std::terminate`
in a thread of gloo's own that nobody can catch, and gloo's sockets know no handshake that would keep a stranger from sending
it. And a thread that a driver holds can only be left behind, while it may still write into blocks that have a new owner.
A helper that can be killed answers all of this by one means, and it is killed whenever a group does not let go of the arena
in time. It maps the worker's arena, which therefore lies in shared memory. The price is a copy of torch of its own (about
200 MB) and a tenth of a millisecond per order; it is only started where the transport is configured.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from core.errors import TransferError
from kvtransfer.collective_orders import Drop, Join, Meet, Order, Receive, Send, to_line
from kvtransfer.copier import settled

log = logging.getLogger(__name__)

GROUPS_MAX = 64
IDLE_S = 600.0  # a group nobody used for so long is dropped when the next one is made
ABANDONED_MAX = 16  # threads left to their timeouts, see `Drop`; beyond, the helper is killed
DROP_S = 4.0  # within which a group lets go of the arena, or the helper is killed
GRACE_S = 2.0  # beyond an order's own timeout
RESTART_S = 5.0  # a helper that ended is not started again sooner; the next transport takes over meanwhile
LINE_BYTES_MAX = 16 * 2**20


@dataclass(slots=True)
class HelperStats:
    """Plain numbers, read when metrics are scraped."""

    starts: int = 0
    kills: int = 0
    groups_made: int = 0
    groups_dropped: int = 0


class Helper:
    """One per worker. Everything on the event loop."""

    def __init__(self, backend: str, host: str, shm_dir: str, *, restart_s: float = RESTART_S) -> None:
        """`backend`: auto, gloo or nccl. `host`: the address other workers reach this one at. Starts the process."""
        self.host = host
        self.stats = HelperStats()
        self._arguments = (backend, host, shm_dir)
        self._restart_s = restart_s
        self._started = 0.0
        self._closed = False
        self._process = self._start()

    async def backend(self) -> str:
        """`gloo` or `nccl`, once the process is ready. Raises TransferError when it cannot be."""
        return await (await self._living()).ready()

    async def make(self, order: Meet | Join) -> Mapping[str, Any]:
        """Raises TransferError; the group is dropped then, also when cancelled."""
        process = await self._living()
        await process.ready()
        await self._make_room(process)
        process.groups[order.group] = time.monotonic()
        self.stats.groups_made += 1
        try:
            return await self._ask(process, order, order.timeout_s)
        except BaseException:
            await settled(asyncio.ensure_future(self.drop(order.group)))
            raise

    async def move(self, order: Send | Receive) -> Mapping[str, Any]:
        """Raises TransferError. However it fails, `drop` has to follow before the blocks are anybody else's."""
        process = self._process
        if order.group not in process.groups:
            raise TransferError("the group is gone")
        process.busy.add(order.group)
        try:
            return await self._ask(process, order, order.timeout_s)
        finally:
            process.busy.discard(order.group)
            if order.group in process.groups:
                process.groups[order.group] = time.monotonic()

    def knows(self, group: str) -> bool:
        return group in self._process.groups

    async def drop(self, group: str) -> None:
        """Comes back when nothing of the group touches the arena. Idempotent. Never to be cancelled: see `settled`."""
        process = self._process
        if process.groups.pop(group, None) is None or process.dying:
            await process.gone_if_dying()
            return
        self.stats.groups_dropped += 1
        try:
            answer = await self._ask(process, Drop(group), DROP_S - GRACE_S)
        except TransferError as error:
            await self._kill(process, f"a group did not let go of the arena: {error.message}")
            return
        if answer["abandoned"] > ABANDONED_MAX:
            await self._kill(process, f"{answer['abandoned']} of its threads wait for peers that are gone")

    async def close(self) -> None:
        """Ends the process. Idempotent."""
        self._closed = True
        await self._process.kill()

    def kill(self) -> None:
        """At once, as a crash would."""
        self._process.popen.kill()

    async def _ask(self, process: _Process, order: Order, timeout_s: float) -> Mapping[str, Any]:
        try:
            async with asyncio.timeout(timeout_s + GRACE_S):
                return await process.ask(order)
        except TimeoutError:
            raise TransferError(f"the helper process did not answer within {timeout_s + GRACE_S:g} s") from None

    async def _make_room(self, process: _Process) -> None:
        now = time.monotonic()
        idle = sorted((used, group) for group, used in process.groups.items() if group not in process.busy)
        if len(process.groups) >= GROUPS_MAX and not idle:
            raise TransferError(f"all of {GROUPS_MAX} groups are in use")
        surplus = len(process.groups) - GROUPS_MAX + 1
        for place, (used, group) in enumerate(idle):
            if place < surplus or now - used > IDLE_S:
                await settled(asyncio.ensure_future(self.drop(group)))

    async def _kill(self, process: _Process, reason: str) -> None:
        log.warning("killing the helper process of the collective transport: %s", reason)
        self.stats.kills += 1
        await process.kill()

    async def _living(self) -> _Process:
        if self._closed:
            raise TransferError("the transport is closed")
        await self._process.gone_if_dying()
        if self._process.ended:
            wait_s = self._started + self._restart_s - time.monotonic()
            if wait_s > 0:
                raise TransferError(f"the helper process has ended; it is started again in {wait_s:.1f} s at the earliest")
            self._process = self._start()
        return self._process

    def _start(self) -> _Process:
        self._started = time.monotonic()
        self.stats.starts += 1
        return _Process(self._arguments)


class _Process:
    """One incarnation of the helper, and what it was asked and has not answered yet."""

    def __init__(self, arguments: tuple[str, str, str]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "kvtransfer.collective_main", str(theirs.fileno()), *arguments]
            # A session of its own: an interrupt at the terminal is the worker's to handle. Nothing on our standard output.
            self.popen = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=2, pass_fds=(theirs.fileno(),), start_new_session=True
            )
        self.groups: dict[str, float] = {}  # when each was used last
        self.busy: set[str] = set()
        self.ended = False
        self._socket = ours
        self._pending: dict[int, asyncio.Future[Mapping[str, Any]]] = {}
        self._number = 0
        self._reading: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[str] | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def ready(self) -> str:
        if self._ready is None:
            self._ready = asyncio.get_running_loop().create_future()
            self._reading = asyncio.create_task(self._read(), name="kv-collective-helper")
        return await asyncio.shield(self._ready)

    async def ask(self, order: Order) -> Mapping[str, Any]:
        await self.ready()
        if self.ended or self._writer is None:
            raise TransferError("the helper process has ended")
        self._number += 1
        number = self._number
        answer: asyncio.Future[Mapping[str, Any]] = asyncio.get_running_loop().create_future()
        self._pending[number] = answer
        try:
            self._writer.write(to_line(number, order))
            return await answer
        finally:
            self._pending.pop(number, None)

    async def kill(self) -> None:
        """Comes back when it is dead."""
        self.popen.kill()
        if self._reading is not None:
            await asyncio.wait([self._reading])
        else:
            self._socket.close()
            await asyncio.to_thread(self.popen.wait)
            self.ended = True

    @property
    def dying(self) -> bool:
        return self.ended or self.popen.poll() is not None

    async def gone_if_dying(self) -> None:
        """A group we do not know is gone with its process, or will be in a moment."""
        if self.dying and self._reading is not None:
            await asyncio.wait([self._reading])

    async def _read(self) -> None:
        reader, self._writer = await asyncio.open_unix_connection(sock=self._socket, limit=LINE_BYTES_MAX)
        reason = "the helper process has ended"
        try:
            while line := await reader.readline():
                reason = self._hear(json.loads(line)) or reason
        except (OSError, ValueError) as error:
            reason = f"the helper process is not understood: {error}"
        finally:
            self.ended = True
            self._writer.close()
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()
            self.popen.kill()
            await asyncio.to_thread(self.popen.wait)  # reaped before anybody hears: what is dead writes nothing
            self._fail(reason)

    def _hear(self, message: Mapping[str, Any]) -> str | None:
        assert self._ready is not None
        if "ready" in message:
            self._ready.set_result(message["ready"])
        elif "fatal" in message:
            return f"the helper process cannot start: {message['fatal']}"
        elif "broken" in message:
            self.groups.pop(message["broken"], None)
        elif (answer := self._pending.get(message["id"])) is not None and not answer.done():
            if "error" in message:
                answer.set_exception(TransferError(message["error"]))
            else:
                answer.set_result(message["result"])
        return None

    def _fail(self, reason: str) -> None:
        self.groups.clear()
        assert self._ready is not None
        futures: list[asyncio.Future[Any]] = [self._ready, *self._pending.values()]
        for waiting in futures:
            if not waiting.done():
                waiting.set_exception(TransferError(reason))
                waiting.exception()  # heard by whoever still waits
