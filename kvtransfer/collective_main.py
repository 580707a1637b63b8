"""The helper process: holds the groups of one worker, a thread each, and does what the worker says over a socket.

    python -m kvtransfer.collective_main FD BACKEND HOST SHM_DIR

It ends when the worker hangs up, however the worker died.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

os.putenv("TORCH_CPP_LOG_LEVEL", "FATAL")  # what fails is told to the worker, once

import numpy as np

from core.errors import DigestMismatchError
from kvtransfer import collective_orders as orders
from kvtransfer.codec import check_digest
from kvtransfer.collective_group import Backend, Group, GroupError
from kvtransfer.shared_arena import MappedArena

DROP_S = 2.0  # within which a thread in mid-transfer ends once its group was aborted; the worker kills us when it does not
SOON_S = 0.05  # most threads end at once; one whose connection is closed may also be left behind
QUEUED_MAX = 4  # orders of one group; the worker waits for each before the next
Job = Callable[[], Mapping[str, Any] | None]
"""What to answer; None when that was done already."""


class Member:
    """A group and the thread that works for it, one order at a time, until one fails or the group is dropped."""

    def __init__(self, group: Group, process: Process) -> None:
        self.group = group
        self._process = process
        self._jobs: queue.Queue[tuple[int, Job] | None] = queue.Queue(QUEUED_MAX)
        self.thread = threading.Thread(target=self._work, name=f"kv-group {group.name[:8]}", daemon=True)
        self.thread.start()

    def put(self, number: int, job: Job) -> None:
        try:
            self._jobs.put_nowait((number, job))
        except queue.Full:
            self._process.say(orders.failure(number, "too many orders for one group at a time"))

    def end(self) -> bool:
        """Wakes the thread where that is possible. Says whether the arena is safe from the group even where it is not."""
        let_go = self.group.abort()
        with contextlib.suppress(queue.Full):  # then it is awake
            self._jobs.put_nowait(None)
        return let_go

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            number, run = job
            try:
                result = run()
            except Exception as error:  # whatever it was, from here on nothing of the group touches the arena
                self.group.abort()
                self._process.broke(self, number, str(error) or repr(error))
                return
            if result is not None:
                self._process.say(orders.answer(number, result))


class Process:
    def __init__(self, sock: socket.socket, backend: Backend, shm_dir: str) -> None:
        self._sock = sock
        self._backend = backend
        self._shm_dir = shm_dir
        self._lock = threading.Lock()
        self._members: dict[str, Member] = {}
        self._abandoned: list[threading.Thread] = []
        self._arena: MappedArena | None = None

    def serve(self) -> None:
        """Until the worker hangs up."""
        self.say(orders.event(ready=self._backend.name))
        with self._sock.makefile("rb") as lines:
            for line in lines:
                self._take(*orders.from_line(line))

    def say(self, line: bytes) -> None:
        with self._lock:
            self._sock.sendall(line)

    def broke(self, member: Member, number: int, reason: str) -> None:
        """In the member's own thread, which ends now."""
        with self._lock:
            known = self._members.get(member.group.name) is member
            if known:
                del self._members[member.group.name]
        self.say(orders.failure(number, reason))
        if known:
            self.say(orders.event(broken=member.group.name))

    def _take(self, number: int, order: orders.Order) -> None:
        match order:
            case orders.Meet() | orders.Join():
                rank = 1 if isinstance(order, orders.Meet) else 0
                member = Member(Group(order.group, rank, self._backend), self)
                with self._lock:
                    self._members[order.group] = member
                self._begin(member, number, order)
            case orders.Drop():
                threading.Thread(target=self._drop, args=(number, order.group), name="kv-group-drop", daemon=True).start()
            case orders.Send() | orders.Receive():
                with self._lock:
                    known = self._members.get(order.group)
                if known is None:
                    self.say(orders.failure(number, "the group is gone"))
                elif isinstance(order, orders.Send):
                    known.put(number, lambda: self._send(known.group, order))
                else:
                    known.put(number, lambda: self._receive(known.group, order))

    def _begin(self, member: Member, number: int, order: orders.Meet | orders.Join) -> None:
        group, timeout_s = member.group, order.timeout_s
        if isinstance(order, orders.Join):
            address = order.store

            def join() -> Mapping[str, Any]:
                group.make(self._backend.find_store(address, timeout_s), timeout_s)
                return {}

            member.put(number, join)
            return

        def meet() -> None:
            store = self._backend.open_store(timeout_s)
            self.say(orders.answer(number, {"port": store.port}))
            group.make(store, timeout_s)

        member.put(number, meet)

    def _drop(self, number: int, name: str) -> None:
        with self._lock:
            member = self._members.pop(name, None)
        if member is not None:
            let_go = member.end()
            member.thread.join(SOON_S if let_go else DROP_S)
            if member.thread.is_alive() and not let_go:
                return  # no answer: the worker draws the consequence
            with self._lock:
                self._abandoned = [t for t in (*self._abandoned, member.thread) if t.is_alive()]
        self.say(orders.answer(number, {"abandoned": len(self._abandoned)}))

    def _send(self, group: Group, order: orders.Send) -> Mapping[str, Any]:
        arena, span = self._mapped(order.span), order.span
        group.send(order.seq, arena.blocks, _cut(span), order.timeout_s)
        changed = arena.generations[np.asarray(span.blocks, np.intp)] != np.asarray(order.generations, np.uint64)
        return {"gone": np.flatnonzero(changed).tolist()}

    def _receive(self, group: Group, order: orders.Receive) -> Mapping[str, Any]:
        arena, pieces = self._mapped(order.span), _cut(order.span)
        corrupted: list[str] = []
        checked = 0

        def arrived(piece: int) -> None:
            nonlocal checked
            places = range(checked, checked + len(pieces[piece]))
            checked = places.stop
            try:
                for place in places if order.digests and not corrupted else ():
                    check_digest(arena.blocks[order.span.blocks[place]], order.digests[place], order.indices[place])
            except DigestMismatchError as error:
                corrupted.append(error.message)  # the rest comes all the same: the group stays in step

        group.receive(order.seq, arena.blocks, pieces, order.timeout_s, arrived)
        return {"corrupted": corrupted[0] if corrupted else None}

    def _mapped(self, span: orders.Span) -> MappedArena:
        """A worker has one arena; another one takes its place."""
        arena = self._arena
        if arena is None or (arena.path, arena.epoch) != (span.arena, span.epoch):
            arena = self._arena = MappedArena(span.arena, span.epoch, self._shm_dir, writable=True)
        return arena


def _cut(span: orders.Span) -> list[list[int]]:
    pieces, start = [], 0
    for size in span.pieces:
        pieces.append(list(span.blocks[start : start + size]))
        start += size
    return pieces


def main() -> None:
    fd, backend, host, shm_dir = sys.argv[1:]
    sock = socket.socket(fileno=int(fd))
    try:
        process = Process(sock, Backend(backend, host), shm_dir)
    except (GroupError, RuntimeError) as error:
        sock.sendall(orders.event(fatal=str(error).splitlines()[0]))
        return
    try:
        process.serve()
    finally:
        os._exit(0)  # threads may wait for peers that never come


if __name__ == "__main__":
    main()
