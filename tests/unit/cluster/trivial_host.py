"""A host with no model: reports like a worker, so that launching, watching and ending can be tested in milliseconds.

Its behaviour hangs on `model.name` of its configuration: "fail" is a mistake of the operator, "crash" a bug, "hang" ignores
every request to stop, "load:PATH" says that as many requests wait as the file holds, "shm:PATH" leaves a file while it runs
and removes it when it ends in order, "propose:WORKER" has the router propose that this worker decodes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc

from cluster.host import run_child
from core.errors import ConfigError
from core.hostspec import HostSpec
from core.report import RoleProposal, WorkerReport, WorkerState
from core.report_wire import report_to_pb
from core.request import WorkerRole
from core.wire import role_from_pb
from tandem.v1 import cluster_pb2 as pb
from tandem.v1 import cluster_pb2_grpc as stubs


async def run(spec: HostSpec, stop: asyncio.Event) -> None:
    name = spec.config.model.name
    if name == "fail":
        raise ConfigError("there is no model at /nowhere; give another path")
    if name == "crash":
        raise ZeroDivisionError("a bug")
    if name == "hang":
        stop = asyncio.Event()
    file = Path(f"{name.removeprefix('shm:')}-{spec.worker_id}-{spec.epoch}") if name.startswith("shm:") else None
    if file is not None:
        file.write_text("kv")
    print("a library prints this")
    print(f"{spec.worker_id} runs", file=sys.stderr)
    reports = asyncio.create_task(_report(spec), name="reports")
    try:
        await stop.wait()
    finally:
        reports.cancel()
        if file is not None:
            file.unlink()


async def _report(spec: HostSpec) -> None:
    router, role, state = spec.role is WorkerRole.ROUTER, spec.role, WorkerState.READY
    verb, _, target = spec.config.model.name.partition(":")
    proposal = RoleProposal(target, WorkerRole.DECODE, "a test") if router and verb == "propose" else None

    waiting = Path(target) if verb == "load" and not router else None

    async def messages() -> AsyncIterator[pb.WorkerReport]:
        sequence = 0
        while True:
            sequence += 1
            yield report_to_pb(
                WorkerReport(
                    worker_id=spec.worker_id,
                    role=role,
                    proposal=proposal,
                    epoch=spec.epoch,
                    sequence=sequence,
                    state=state,
                    pid=os.getpid(),
                    waiting=int(waiting.read_text()) if waiting is not None else 0,
                    grpc_address=f"127.0.0.1:{40_000 + spec.epoch}" if router else "127.0.0.1:1",
                    http_address=f"127.0.0.1:{41_000 + spec.epoch}" if router else "",
                )
            )
            await asyncio.sleep(spec.config.cluster.heartbeat_s)

    if not spec.controller:
        return
    with contextlib.suppress(grpc.RpcError):
        async with grpc.aio.insecure_channel(spec.controller) as channel:
            async for reply in stubs.ClusterStub(channel).Report(messages()):  # type: ignore[no-untyped-call]
                role = role_from_pb(reply.role) if reply.role else role
                state = WorkerState.DRAINING if reply.drain and verb == "load" else state


if __name__ == "__main__":
    run_child(run)
