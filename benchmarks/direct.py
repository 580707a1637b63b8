"""A worker driven over its own session, without router and SDK: what it needs itself, to be told from what they add."""

from __future__ import annotations

import itertools
import queue
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from core.wire import each_event
from tandem.v1 import cluster_pb2, decode_pb2_grpc
from tandem.v1 import common_pb2 as pb
from tandem.v1.cluster_pb2_grpc import ClusterStub

TIMEOUT_S = 60.0


class DirectWorker:
    """One prompt at a time. `added_s` is the first token here, less what the worker says it waited and computed."""

    def __init__(self, commands: queue.SimpleQueue[Any], events: Iterator[Any]) -> None:
        self._commands = commands
        self._events = events
        self._numbers = itertools.count()

    def added_s(self, prompt: list[int]) -> float:
        key = pb.AttemptKey(request_id=f"direct/{next(self._numbers)}", attempt=1)
        item = pb.WorkItem(key=key, token_ids=prompt, prompt_len=len(prompt))
        item.sampling.max_tokens = 1
        item.sampling.seed = 1
        first_s, timing, started = 0.0, None, time.perf_counter()
        self._commands.put(pb.SessionCommand(generate_local=pb.GenerateLocal(item=item)))
        while not first_s or timing is None:
            for event in each_event(next(self._events)):
                match event.WhichOneof("event"):
                    case "tokens":
                        first_s = time.perf_counter() - started
                    case "prefill_done":
                        timing = event.prefill_done.timing
                    case "failed":
                        raise RuntimeError(event.failed.message)
        return first_s - timing.queue_s - timing.prefill_s


@contextmanager
def direct_worker(router: str) -> Iterator[DirectWorker]:
    """The colocated worker of the cluster behind the router at `router`."""
    with grpc.insecure_channel(router) as channel:
        stub: Any = ClusterStub
        workers = stub(channel).GetStatus(cluster_pb2.GetStatusRequest(), timeout=TIMEOUT_S).workers
    worker = next(w for w in workers if w.worker_id.startswith("colocated"))
    commands: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with grpc.insecure_channel(worker.grpc_address) as channel:
        stub = decode_pb2_grpc.DecodeStub
        events = stub(channel).Session(iter(commands.get, None))
        commands.put(pb.SessionCommand(hello=pb.SessionHello(peer_id="bench", epoch=1, expected_epoch=worker.epoch)))
        next(events)
        try:
            yield DirectWorker(commands, events)
        finally:
            commands.put(None)
            events.cancel()
