"""Hears from store nodes which blocks they have: a stream each, opened again while the view says that they live."""

from __future__ import annotations

import asyncio
import logging

import grpc

from core.errors import InvalidRequestError
from core.report import WorkerState
from core.request import WorkerRole
from core.wire import changes_from_pb
from router.kv_events import KvEvents
from router.links import BACKOFF_MAX_S, BACKOFF_MIN_S, CHANNEL_OPTIONS
from router.view import ClusterView, WorkerView
from tandem.cancelling import heed_cancellation
from tandem.v1 import kv_pb2
from tandem.v1.kv_pb2_grpc import KvStub

log = logging.getLogger(__name__)

_ALIVE = frozenset({WorkerState.READY, WorkerState.DRAINING})


class StoreLinks:
    """Nothing waits for it: a store that is not heard costs predictions, not requests."""

    def __init__(self, events: KvEvents) -> None:
        self._events = events
        self._streams: dict[str, tuple[tuple[int, str], asyncio.Task[None]]] = {}
        self._ending: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._streams)

    def follow(self, view: ClusterView) -> None:
        """Stores that are gone, or are another incarnation, are forgotten at once, and so is what they held. One that the view
        does not name is heard on: a controller that starts anew knows nobody yet."""
        stores = {worker.worker_id: worker for worker in view.workers.values() if worker.role is WorkerRole.STORE}
        for name, (incarnation, _) in list(self._streams.items()):
            store = stores.get(name)
            if store is not None and (store.state not in _ALIVE or (store.epoch, store.address) != incarnation):
                self._end(name)
        for name, store in stores.items():
            if name not in self._streams and store.state in _ALIVE and store.address:
                task = asyncio.create_task(self._run(store), name=f"store link {name}@{store.epoch}")
                self._streams[name] = ((store.epoch, store.address), task)

    async def close(self) -> None:
        for name in list(self._streams):
            self._end(name)
        await asyncio.gather(*self._ending, return_exceptions=True)

    def _end(self, name: str) -> None:
        _, task = self._streams.pop(name)
        task.cancel()
        self._events.down(name)
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _run(self, store: WorkerView) -> None:
        """Until cancelled."""
        pause_s = BACKOFF_MIN_S
        while True:
            heard = False
            try:
                async with grpc.aio.insecure_channel(store.address, options=CHANNEL_OPTIONS) as channel:
                    heard = await self._listen(store, KvStub(channel))  # type: ignore[no-untyped-call]
            except grpc.aio.AioRpcError as error:
                log.debug("store %s does not tell of its blocks: %s", store.worker_id, error.details())
            except Exception:
                log.exception("what store %s told of its blocks could not be used", store.worker_id)
            heed_cancellation()
            self._events.down(store.worker_id)
            pause_s = BACKOFF_MIN_S if heard else min(pause_s * 2, BACKOFF_MAX_S)
            await asyncio.sleep(pause_s)

    async def _listen(self, store: WorkerView, stub: KvStub) -> bool:
        """Until the stream ends, or has to begin anew. Whether anything was heard."""
        heard = False
        stream = self._events.up(store.worker_id)
        call = stub.Changes(kv_pb2.ChangesRequest(epoch=store.epoch, stream=stream))
        try:
            async for message in call:
                try:
                    again = self._events.heard(store.worker_id, changes_from_pb(message))
                except InvalidRequestError as error:
                    log.warning("store %s: %s", store.worker_id, error.message)
                    again = self._events.broken(store.worker_id)
                if again is not None:
                    break
                heard = True
        finally:
            call.cancel()
        return heard
