"""A worker of the pools: prefill, decode or colocated, and another of these when the controller says so, while it runs.

It serves both roles' commands all the time, on one engine and one KV plane. Its role is what it says of itself, by which
routers choose it, and how its engine fills steps: a change drops nothing that it holds, and what was on its way on the old
terms is carried out on them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from prometheus_client.core import Metric

from cluster.roles import engine_role
from core.hostspec import HostSpec
from core.request import AttemptKey
from core.service import Registration
from decode_worker.parts import DecodeParts
from engine.output import StepOutput
from prefill_worker.parts import PrefillParts
from worker.kv_plane import KvPlane
from worker.messages import OpenHandoff, Opening, StartPrefill
from worker.session import Handler, SessionServicer
from worker.shell import Base, WorkerInfo, WorkerKind, run_worker


class _BothHandler:
    """Gives each command to whom it is meant for. `handed_over` are the prompts that the engine computes for others."""

    def __init__(self, prefill: Handler, decode: Handler) -> None:
        self.handed_over: set[AttemptKey] = set()
        self._prefill = prefill
        self._decode = decode

    def open(self, command: Opening) -> None:
        if isinstance(command, StartPrefill):
            self.handed_over.add(command.item.key)
            self._prefill.open(command)
        else:
            self._decode.open(command)

    def open_handoff(self, command: OpenHandoff) -> None:
        self._decode.open_handoff(command)

    def cancel(self, key: AttemptKey) -> None:
        self.handed_over.discard(key)
        self._prefill.cancel(key)
        self._decode.cancel(key)


class ServingParts:
    """What the shell drives: both roles over one KV plane."""

    def __init__(self, base: Base) -> None:
        self._links = base.links
        self._kv = KvPlane(base)
        self._prefill = PrefillParts(base, self._kv)
        self._decode = DecodeParts(base, self._kv)
        self.handler = _BothHandler(self._prefill.handler, self._decode.handler)

    def registrations(self, session: SessionServicer) -> list[Registration]:
        return [*self._prefill.registrations(session), *self._decode.registrations(session), *self._kv.registrations()]

    def started(self) -> None:
        self._kv.started()

    def on_step(self, output: StepOutput, started: float) -> None:
        handed_over = self.handler.handed_over
        if not handed_over:
            self._decode.on_step(output, started)
        else:
            theirs, ours = output.parted(handed_over)
            self._prefill.on_step(theirs, started)
            self._decode.on_step(ours, started)
            handed_over.difference_update(theirs.left)
        self._kv.on_step(output)

    def tick(self) -> None:
        self._decode.tick()
        self._kv.tick()
        self.handler.handed_over.difference_update([key for key in self.handler.handed_over if not self._links.is_live(key)])

    def pending(self) -> int:
        return self._decode.pending() + len(self._kv.arrivals)  # prompts that wait for their puller show as leases

    def collect(self) -> Iterable[Metric]:
        yield from self._prefill.collect()
        yield from self._decode.collect()
        yield from self._kv.collect()

    async def close(self) -> None:
        await self._decode.close()
        await self._kv.close()


KIND = WorkerKind(engine_role, ServingParts)


async def run(spec: HostSpec, stop: asyncio.Event, on_ready: Callable[[WorkerInfo], None] | None = None) -> None:
    """Runs a worker until `stop` is set; see `worker.shell.run_worker`."""
    await run_worker(spec, stop, KIND, on_ready)
