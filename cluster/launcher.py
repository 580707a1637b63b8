"""Starting and ending hosts: the port, and its form for child processes of this one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Protocol

from cluster.host import Ended
from core.errors import ConfigError
from core.hostspec import HostSpec

log = logging.getLogger(__name__)

HOST_COMMAND = (sys.executable, "-m", "cluster.host")
KILL_WAIT_S = 5.0
_LINE_BYTES_MAX = 64 * 1024


class Handle(Protocol):
    """One running host."""

    @property
    def exited(self) -> asyncio.Future[Ended]:
        """Done, once, when the host is gone, with why. Never fails; shield it when waiting with a timeout."""
        ...

    async def stop(self, grace_s: float) -> None:
        """Asks it to finish, kills it after `grace_s`; returns when it is gone. Idempotent."""
        ...


class Launcher(Protocol):
    async def launch(self, spec: HostSpec) -> Handle:
        """Starts a host and returns without waiting for it to be ready. Raises ConfigError when it cannot be placed."""
        ...

    async def close(self) -> None:
        """Ends whatever still runs and everything the launcher itself started."""
        ...


def to_stderr(line: str) -> None:
    sys.stderr.write(line + "\n")


class LocalLauncher:
    """Each host is a child process in a process group of its own, so that a Ctrl-C in the terminal reaches only us.

    A child dies with the process that called `launch`: the kernel tells it when the *thread* that forked it ends, so
    use this from the main thread. `on_line` gets what children write to standard error.
    """

    def __init__(self, command: Sequence[str] = HOST_COMMAND, on_line: Callable[[str], None] = to_stderr) -> None:
        self._command = tuple(command)
        self._on_line = on_line
        self._running: set[_Child] = set()

    async def launch(self, spec: HostSpec) -> Handle:
        process = await asyncio.create_subprocess_exec(
            *self._command,
            str(os.getpid()),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
            limit=_LINE_BYTES_MAX,
        )
        child = _Child(spec, process, self._on_line)
        self._running.add(child)
        child.exited.add_done_callback(lambda _: self._running.discard(child))
        return child

    async def close(self) -> None:
        await asyncio.gather(*(child.stop(0.0) for child in tuple(self._running)))


class _Child:
    def __init__(self, spec: HostSpec, process: asyncio.subprocess.Process, on_line: Callable[[str], None]) -> None:
        self.exited: asyncio.Future[Ended] = asyncio.get_running_loop().create_future()
        self._name = spec.worker_id
        self._process = process
        self._on_line = on_line
        self._task = asyncio.create_task(self._watch(spec), name=f"child {spec.worker_id}@{spec.epoch}")

    async def stop(self, grace_s: float) -> None:
        if not self.exited.done() and grace_s > 0:
            self._signal(signal.SIGTERM)
            await asyncio.wait([self.exited], timeout=grace_s)
        if not self.exited.done():
            self._signal(signal.SIGKILL)
            await asyncio.wait([self.exited], timeout=KILL_WAIT_S)
        if not self.exited.done():
            log.error("%s (pid %d) survives SIGKILL; look at it with ps", self._name, self._process.pid)

    async def _watch(self, spec: HostSpec) -> None:
        try:
            await self._hand_over(spec)
            report, _, code = await asyncio.gather(self._last_words(), self._forward_log(), self._reap())
            self._finish(_explain(report, code))
        except asyncio.CancelledError:
            self._signal(signal.SIGKILL)
            self._finish(Ended("its launcher was cancelled"))
            raise
        except Exception as error:
            log.exception("watching %s failed", self._name)
            self._signal(signal.SIGKILL)
            self._finish(Ended(f"watching it failed: {error}"))

    def _finish(self, ended: Ended) -> None:
        if not self.exited.done():
            self.exited.set_result(ended)

    async def _hand_over(self, spec: HostSpec) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        with contextlib.suppress(ConnectionError):  # it died already; its exit says why
            stdin.write(spec.to_json().encode() + b"\n")
            await stdin.drain()
        stdin.close()

    async def _reap(self) -> int:
        await process_gone(self._process.pid)
        self._signal(signal.SIGKILL)  # a grandchild would keep our pipes open
        return await self._process.wait()

    async def _last_words(self) -> bytes:
        stdout = self._process.stdout
        assert stdout is not None
        last = b""
        while line := await _read_line(stdout):
            last = line
        return last

    async def _forward_log(self) -> None:
        stderr = self._process.stderr
        assert stderr is not None
        while raw := await _read_line(stderr):
            line = raw.decode(errors="replace").rstrip("\n")
            self._on_line(line if f" {self._name} " in line else f"{self._name}: {line}")

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


async def process_gone(pid: int) -> None:
    """Returns when no process `pid` runs any more; at once when there is none. Sees every process, not only children."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop = asyncio.get_running_loop()
    gone: asyncio.Future[None] = loop.create_future()
    loop.add_reader(fd, lambda: None if gone.done() else gone.set_result(None))
    try:
        await gone
    finally:
        loop.remove_reader(fd)
        os.close(fd)


async def _read_line(stream: asyncio.StreamReader) -> bytes:
    """A line, or a part of one that is too long; empty at the end."""
    try:
        return await stream.readuntil(b"\n")
    except asyncio.IncompleteReadError as error:
        return error.partial
    except asyncio.LimitOverrunError as error:
        return await stream.readexactly(max(1, error.consumed))


def _explain(report: bytes, code: int) -> Ended:
    """What the child said before it left, else what the operating system says."""
    if report.strip():
        try:
            fields = json.loads(report)
            return Ended(str(fields["reason"]), bool(fields["permanent"]))
        except (ValueError, KeyError, TypeError):
            log.warning("a host ended with words that mean nothing here: %r", report[:200])
    if code < 0:
        return Ended(f"killed by {signal.Signals(-code).name}")
    return Ended(f"exited with status {code}")


def check_address(name: str, address: str) -> None:
    """Raises ConfigError when `address` cannot be listened on right now (port 0 always can)."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"{name} must be HOST:PORT (port 0 picks a free one), got {address!r}")
    try:
        family, kind, proto, _, where = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
    except OSError as error:
        raise ConfigError(f"{name} cannot listen on {address}: {error.strerror}; choose another port or 0") from None
