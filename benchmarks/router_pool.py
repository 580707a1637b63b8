"""A pool of workers that compute nothing, and the controller's side of a router: one process, for `benchmarks.router`.

Prefill and decode workers speak the real Session protocol. A running request gets a token per step, all tokens of a step
in one event; a step takes `step_s`. While one message is being written the next steps run, and what they have to tell goes
in one message, as with real workers; with 32 steps untold a worker waits, and that is counted as waiting for the router.
The event loop is the one that hosts run workers on.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import uvloop

from core.blocks import KvLayout, KvSource, KvTicket
from core.request import AttemptKey, WorkerRole
from core.service import Registration, serve
from core.wire import each_command, key_from_pb, layout_to_pb, role_to_pb, ticket_to_pb
from tandem.v1 import cluster_pb2, cluster_pb2_grpc
from tandem.v1 import common_pb2 as pb
from tandem.v1.decode_pb2_grpc import add_DecodeServicer_to_server
from tandem.v1.prefill_pb2_grpc import add_PrefillServicer_to_server

LAYOUT = KvLayout(b"f" * 16, "float32", 1, 1, 8, 16)
TOKEN_ID = 300
EVENTS_PER_MESSAGE = UNTOLD_MAX = 32


class Gate:
    """Holds decoding back until so many requests have joined, so that all of them run at once."""

    def __init__(self) -> None:
        self._missing = 0
        self._open = asyncio.Event()
        self._open.set()

    def expect(self, requests: int) -> None:
        self._missing = requests
        self._open.clear()

    def joined(self) -> None:
        self._missing -= 1
        if self._missing <= 0:
            self._open.set()

    @property
    def is_open(self) -> bool:
        return self._open.is_set()

    async def passed(self, other: asyncio.Event) -> None:
        """Returns when it opens, or when `other` is set: there are replies to give."""
        waits = [asyncio.create_task(event.wait(), name="gate") for event in (self._open, other)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()


GATE = Gate()


class Worker:
    """One servicer and its counters; each session has requests of its own."""

    def __init__(self, role: WorkerRole, step_s: float, number: int) -> None:
        self.role, self.step_s, self.address = role, step_s, ""
        self.name = f"{role.value}-{number}"
        self.waited_s = 0.0
        self.timing = False
        self.tokens = 0
        self.busy_s = 0.0
        self.written_at: dict[str, list[float]] = {}  # of each request's tokens from the second on, when asked for

    async def Session(self, requests: AsyncIterator[pb.SessionCommand], context: Any) -> None:
        await anext(requests)
        await context.write(pb.SessionEvent(hello=pb.SessionHello(peer_id=self.name, epoch=1)))
        session = Session(self)
        tasks = [
            asyncio.create_task(session.read(requests), name="bench read"),
            asyncio.create_task(session.step(), name="bench step"),
        ]
        try:
            await session.write(context)
        finally:
            for task in tasks:
                task.cancel()


class Session:
    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._limits: dict[AttemptKey, int] = {}
        self._running: dict[AttemptKey, int] = {}
        self._replies: deque[pb.SessionEvent] = deque()
        self._wake = asyncio.Event()  # requests may have come
        self._told = asyncio.Event()  # there is something to write
        self._taken = asyncio.Event()  # something was written

    async def step(self) -> None:
        worker, due, timed = self._worker, 0.0, self._worker.written_at
        while True:
            self._wake.clear()
            if not self._running:
                await self._wake.wait()
                continue
            if not GATE.is_open:
                await GATE.passed(self._wake)
                continue
            due = max(due + worker.step_s, time.perf_counter() - worker.step_s)  # a late step is caught up, not more
            names = [key.request_id for key in self._running]
            self._tell(self._tokens_of_step())
            made = time.perf_counter()
            if self._worker.timing:
                for name in names:
                    timed.setdefault(name.partition("@")[0], []).append(made)
            waited_s = await self._room()
            worker.busy_s += max(waited_s, worker.step_s)
            worker.waited_s += waited_s
            await asyncio.sleep(max(due - time.perf_counter(), 0.0))

    async def _room(self) -> float:
        """Until the router has taken enough, which real workers would not wait for; seconds."""
        began = time.perf_counter()
        while len(self._replies) >= UNTOLD_MAX:
            self._taken.clear()
            await self._taken.wait()
        return time.perf_counter() - began

    def _tell(self, *events: pb.SessionEvent) -> None:
        self._replies += events
        self._told.set()

    async def write(self, context: Any) -> None:
        """What waits together is told together, as `worker.outbox` and `worker.codec` do."""
        while True:
            if not self._replies:
                self._told.clear()
                await self._told.wait()
            message = self._replies.popleft()
            count = min(len(self._replies), EVENTS_PER_MESSAGE - 1)
            message.more.extend([self._replies.popleft() for _ in range(count)])
            await context.write(message)
            self._taken.set()

    def _tokens_of_step(self) -> pb.SessionEvent:
        step = pb.StepTokens()
        for key, position in list(self._running.items()):
            last = position + 1 == self._limits[key]
            token = step.tokens.add(position=position, token_id=TOKEN_ID)
            token.key.request_id, token.key.attempt = key
            self._running[key] = position + 1
            if last:
                token.finish_reason = pb.FINISH_REASON_LENGTH
                del self._running[key], self._limits[key]
        self._worker.tokens += len(step.tokens)
        return pb.SessionEvent(tokens=step)

    async def read(self, requests: AsyncIterator[pb.SessionCommand]) -> None:
        async for message in requests:
            for command in each_command(message):
                self._heed(command)
            self._wake.set()

    def _heed(self, command: pb.SessionCommand) -> None:
        kind = command.WhichOneof("command")
        if kind == "cancel":
            self._running.pop(key_from_pb(command.cancel.key), None)
            self._limits.pop(key_from_pb(command.cancel.key), None)
        elif kind == "open_handoff":
            self._open(command.open_handoff.key)
        elif kind == "reserve":
            item = command.reserve.item
            self._limits[key_from_pb(item.key)] = item.sampling.max_tokens
            self._tell(pb.SessionEvent(reserved=pb.Reserved(key=item.key, granted=True)))
        elif kind == "start_prefill":
            self._prefill(command.start_prefill.item)
        elif kind == "generate_local":
            self._generate(command.generate_local.item)

    def _prefill(self, item: pb.WorkItem) -> None:
        source = KvSource(self._worker.name, 1, self._worker.address)
        ticket = ticket_to_pb(KvTicket(key_from_pb(item.key), LAYOUT, source, 10.0))
        self._tell(
            pb.SessionEvent(opened=pb.Opened(key=item.key, ticket=ticket)),
            pb.SessionEvent(tokens=pb.StepTokens(tokens=[_first_token(item)])),
            pb.SessionEvent(prefill_done=pb.PrefillDone(key=item.key)),
        )

    def _generate(self, item: pb.WorkItem) -> None:
        """The whole request; its first token comes at once."""
        self._limits[key_from_pb(item.key)] = item.sampling.max_tokens
        self._tell(pb.SessionEvent(tokens=pb.StepTokens(tokens=[_first_token(item)])))
        self._tell(pb.SessionEvent(prefill_done=pb.PrefillDone(key=item.key)))
        self._run(key_from_pb(item.key))

    def _open(self, key: pb.AttemptKey) -> None:
        self._tell(pb.SessionEvent(joined=pb.Joined(key=key)))
        self._run(key_from_pb(key))

    def _run(self, key: AttemptKey) -> None:
        if self._limits.get(key, 0) > 1:  # else the first token is the last one
            self._running[key] = 1
            GATE.joined()


def _first_token(item: pb.WorkItem) -> pb.GeneratedToken:
    over = pb.FINISH_REASON_LENGTH if item.sampling.max_tokens == 1 else pb.FINISH_REASON_UNSPECIFIED
    return pb.GeneratedToken(key=item.key, position=0, token_id=TOKEN_ID, finish_reason=over)


class Controller(cluster_pb2_grpc.ClusterServicer):
    """Tells the router of the workers, and the parent where the router listens."""

    def __init__(self, workers: list[Worker]) -> None:
        self._workers = workers

    async def Report(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        said = False
        async for report in requests:
            if not said and report.state == cluster_pb2.WORKER_STATE_READY:
                print(json.dumps({"router": report.grpc_address, "http": report.http_address}), flush=True)
                said = True
            yield cluster_pb2.ReportReply()

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        while True:
            reports = [self._report(worker) for worker in self._workers]
            yield cluster_pb2.ClusterSnapshot(version=1, workers=reports, ages_s=[0.0] * len(reports))
            await asyncio.sleep(0.5)

    def _report(self, worker: Worker) -> cluster_pb2.WorkerReport:
        return cluster_pb2.WorkerReport(
            worker_id=worker.name,
            role=role_to_pb(worker.role),
            epoch=1,
            state=cluster_pb2.WORKER_STATE_READY,
            grpc_address=worker.address,
            blocks=cluster_pb2.BlockCounts(total=100_000, free=100_000),
            layout=layout_to_pb(LAYOUT),
            model=cluster_pb2.ModelInfo(name="nothing", max_model_len=100_000, vocab_size=2000),
        )


async def main(roles: list[str], step_s: float) -> None:
    """Prints `{"controller", "workers"}`, then `{"router", "http"}` of each router; each line on standard input is answered
    with the counters. After `time N`, they decode once N requests have joined and note when; `times` has them tell."""
    workers = [Worker(WorkerRole(role), step_s, number) for number, role in enumerate(roles)]
    async with AsyncExitStack() as stack:
        for worker in workers:
            prefill = worker.role is WorkerRole.PREFILL
            add = add_PrefillServicer_to_server if prefill else add_DecodeServicer_to_server
            name = "tandem.v1.Prefill" if prefill else "tandem.v1.Decode"
            server = await stack.enter_async_context(serve("127.0.0.1:0", Registration(name, add, worker), grace_s=0))
            worker.address = server.address
        cluster = Registration("tandem.v1.Cluster", cluster_pb2_grpc.add_ClusterServicer_to_server, Controller(workers))
        controller = await stack.enter_async_context(serve("127.0.0.1:0", cluster, grace_s=0))
        print(json.dumps({"controller": controller.address, "workers": [w.address for w in workers]}), flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            if line == "times\n":
                print(json.dumps({name: at for w in workers for name, at in w.written_at.items()}), flush=True)
                continue
            word, _, number = line.strip().partition(" ")
            for worker in workers:
                worker.timing = word == "time"
                worker.written_at.clear()
            if number:
                GATE.expect(int(number))
            counters = {
                "waited_s": sum(w.waited_s for w in workers),
                "busy_s": sum(w.busy_s for w in workers),
                "tokens": sum(w.tokens for w in workers),
            }
            print(json.dumps(counters), flush=True)


if __name__ == "__main__":
    uvloop.run(main(sys.argv[2:], float(sys.argv[1])))
