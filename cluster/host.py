"""The process that a worker or a router lives in. Plain: a launcher runs it as a child process, or wraps it in a Ray actor."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import faulthandler
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import NamedTuple

from core.config import pin_threads
from core.errors import ConfigError
from core.hostspec import HostSpec
from core.request import WorkerRole
from core.telemetry import configure_logging

log = logging.getLogger(__name__)

Entry = Callable[[HostSpec, asyncio.Event], Awaitable[None]]
HANG_MARGIN_S = 5.0
GRACE_MAX_S = 7 * 86_400.0
_PR_SET_PDEATHSIG = 1


class Ended(NamedTuple):
    """Why a host is gone. `permanent`: starting it again with the same configuration cannot help."""

    reason: str
    permanent: bool = False


def entry_of(role: WorkerRole) -> Entry:
    """What runs in a host of this role. Imported late: routers and stores never load torch."""
    if role in (WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.COLOCATED):
        from cluster import serving_worker

        return serving_worker.run
    if role is WorkerRole.ROUTER:
        from cluster.shared_totals import run_router

        return run_router
    if role is WorkerRole.STORE:
        from kvtransfer import main as store

        return store.run
    raise ConfigError(f"this version cannot run a {role.value} worker")


class Host:
    """Runs one role until it ends or `stop` is called. One asyncio loop, made by the thread that calls `run`."""

    def __init__(self, spec: HostSpec, entry: Entry | None = None) -> None:
        self._spec = spec
        self._entry = entry
        self._lock = threading.RLock()  # a signal handler may stop a host inside its own critical section
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._task: asyncio.Task[None] | None = None
        self._grace_s: float | None = None  # set once stopping was asked for

    def __repr__(self) -> str:
        return self._spec.worker_id

    def run(self) -> Ended:
        """Blocks until the role has ended; never raises for what the role does. Call once."""
        pin_threads(self._spec.config.engine.threads)
        configure_logging(self._spec.config.log_level, self._spec.worker_id)
        try:
            entry = self._entry or entry_of(self._spec.role)
            with asyncio.Runner(loop_factory=_new_loop) as runner:
                runner.run(_live(self, entry, self._spec))
        except BaseException as error:
            return self._explain(error)
        return Ended("stopped" if self._grace_s is not None else "ended by itself")

    def stop(self, grace_s: float) -> None:
        """From any thread: asks the role to finish and cancels it after `grace_s`. Returns at once."""
        with self._lock:
            self._grace_s = grace_s
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._begin_stop, grace_s)

    def _begin(self, task: asyncio.Task[None], stop: asyncio.Event) -> None:
        """On the loop's thread, before the role runs."""
        with self._lock:
            self._loop, self._stop, self._task = asyncio.get_running_loop(), stop, task
            if self._grace_s is not None:  # asked for while the role was being imported
                self._begin_stop(self._grace_s)

    def _begin_stop(self, grace_s: float) -> None:
        assert self._loop is not None
        assert self._stop is not None
        assert self._task is not None
        self._stop.set()
        self._loop.call_later(grace_s, self._task.cancel)

    def _end(self) -> None:
        with self._lock:
            self._loop = None

    def _explain(self, error: BaseException) -> Ended:
        mistakes = [leaf for leaf in _leaves(error) if isinstance(leaf, ConfigError)]
        if mistakes:
            return Ended(str(mistakes[0]), permanent=True)
        if isinstance(error, asyncio.CancelledError) and self._grace_s is not None:
            return Ended("did not finish within its grace time")
        log.error("%s failed", self._spec.worker_id, exc_info=error)
        leaf = next(_leaves(error))
        return Ended(f"{type(leaf).__name__}: {leaf}")


async def _live(host: Host, entry: Entry, spec: HostSpec) -> None:
    """Not a method: one coroutine among its methods, and Ray would run them all on an event loop of its own."""
    stop = asyncio.Event()
    task = asyncio.ensure_future(_call(entry, spec, stop))
    host._begin(task, stop)
    try:
        await task
    finally:
        host._end()


async def _call(entry: Entry, spec: HostSpec, stop: asyncio.Event) -> None:
    await entry(spec, stop)


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


# ---- as a child process ------------------------------------------------------------------------------------------


def run_child(entry: Entry | None = None) -> None:
    """The whole life of a child process: spec on standard input, last words as JSON on standard output, log on standard error.

    The parent's pid is the last argument. When the parent dies, the kernel sends SIGTERM, so that a worker removes its
    shared memory even after its parent was killed; a watchdog ends a process that does not get there.
    """
    _follow(int(sys.argv[-1]))
    last_words = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print belongs to the log
    line = sys.stdin.readline()
    if not line:
        return
    spec = HostSpec.from_json(line)
    host = Host(spec, entry)
    grace_s = spec.config.cluster.grace_s

    def on_signal(number: int, frame: object) -> None:
        host.stop(grace_s)
        faulthandler.dump_traceback_later(min(grace_s, GRACE_MAX_S) + HANG_MARGIN_S, exit=True)

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ended = host.run()
    with contextlib.suppress(OSError):
        last_words.write(json.dumps(ended._asdict()) + "\n")
        last_words.flush()
    logging.shutdown()
    os._exit(0)  # the role has tidied up; taking torch apart would cost seconds


def _follow(parent: int) -> None:
    """Dies with its parent, also when that happened before this line."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        sys.exit("the launcher of this host is gone")


if __name__ == "__main__":
    run_child()
