"""The router's index follows real workers and a real store: what they compute, drop and lose, and after a restart of either."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from types import MappingProxyType

import pytest
from plane_rig import DECODE, PREFILL, Plane, converse, finished_keys, met, plane, split
from worker_harness import DEADLINE_S, EPOCH, RunningWorker, until

from core.clock import SystemClock
from core.config import RouterConfig
from core.report import WorkerState
from core.request import WorkerRole, WorkItem
from router.attempt import Limits
from router.dispatch import Dispatcher
from router.links import Links
from router.placing import Placer
from router.policies import make_policy
from router.store_links import StoreLinks
from router.view import ClusterView, WorkerView
from router.waiting_room import WaitingRoom

pytestmark = pytest.mark.service


@dataclass
class Router:
    """What a router process wires, without its fronts."""

    placer: Placer
    dispatcher: Dispatcher
    stores: StoreLinks
    links: Links

    def follow(self, *workers: RunningWorker, store: str = "", store_epoch: int = EPOCH) -> None:
        ready = WorkerState.READY
        seen = [WorkerView(w.spec.worker_id, w.spec.role, EPOCH, ready, w.info.grpc_address) for w in workers]
        if store:
            seen.append(WorkerView("store-0", WorkerRole.STORE, store_epoch, ready, store))
        view = ClusterView(1, MappingProxyType({worker.worker_id: worker for worker in seen}))
        self.dispatcher.follow(view)
        self.stores.follow(view)

    def holders(self, key: bytes) -> set[str]:
        index = self.placer.index
        assert index is not None
        depths = index.match((key,)).depths
        return {name for name, slot in index.slots.of.items() if depths[slot]}


@asynccontextmanager
async def router(epoch: int = 1) -> AsyncIterator[Router]:
    config, clock = RouterConfig(), SystemClock()
    placer = Placer(make_policy("goodput"), 3.0, random.Random(0))
    assert placer.events is not None
    dispatcher = Dispatcher(placer, Limits(5.0, 5.0, 3), WaitingRoom(config), clock)
    links = dispatcher.links = Links("router-9", epoch, 5.0, dispatcher, placer.events)
    stores = StoreLinks(placer.events)
    try:
        yield Router(placer, dispatcher, stores, links)
    finally:
        dispatcher.close()
        await links.close()
        await stores.close()


async def agrees(router: Router, p: Plane, *workers: RunningWorker) -> set[bytes]:
    """Waits until the router believes of every worker what is true, and of the store what the directory says."""

    async def true() -> set[bytes]:
        held = {worker.spec.worker_id: {entry.key for entry in worker.inventory.entries()} for worker in workers}
        keys = set().union(*held.values())
        located = await asyncio.gather(*(p.table.locate([key]) for key in keys))
        stored = {key for key, found in zip(keys, located, strict=True) if "store-0" in found.nodes}
        truth = {key: {name for name in held if key in held[name]} | ({"store-0"} if key in stored else set()) for key in keys}
        return keys if all(router.holders(key) == names for key, names in truth.items()) else set()

    async with asyncio.timeout(DEADLINE_S):
        while not (keys := await true()):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    return keys


@pytest.fixture(scope="module")
def conversation() -> tuple[list[WorkItem], list[list[int]]]:
    return asyncio.run(converse())


async def test_the_index_follows_what_is_computed_dropped_and_lost(conversation):
    turns, _ = conversation
    async with plane() as p, AsyncExitStack() as stack, p.store(), p.worker(DECODE, "decode-0") as decode:
        prefill = await stack.enter_async_context(p.worker(PREFILL, "prefill-0"))
        await met(prefill, 1)  # the store has seen no block yet
        address = next(node.source.grpc_address for node in await p.table.nodes() if node.source.worker_id == "store-0")
        async with router() as eyes:
            eyes.follow(prefill, decode, store=address)
            tokens, _ = await split(prefill, decode, turns[0])
            kept = finished_keys(prefill, turns[0], tokens)
            await p.knows(kept, "store-0")
            assert set(kept) <= await agrees(eyes, p, prefill, decode)
            prefill.inventory.evict(kept[:2])  # without a step that would tell of it
            assert eyes.placer.events is not None
            await agrees(eyes, p, prefill, decode)
            assert eyes.holders(kept[0]) == {"decode-0", "store-0"}
            await split(prefill, decode, turns[1])
            await agrees(eyes, p, prefill, decode)
            assert eyes.placer.events.gaps == 0
            async with router(epoch=2) as again:  # another life of the router: everything is said anew
                again.follow(prefill, decode, store=address)
                assert set(kept) <= await agrees(again, p, prefill, decode)
            await stack.aclose()
            await until(lambda: not any("prefill-0" in eyes.holders(key) for key in kept))
            eyes.follow(decode, store=address, store_epoch=EPOCH + 1)  # the store is another incarnation, says the controller
            assert not any("store-0" in eyes.holders(key) for key in kept)
            eyes.follow(decode, store=address)
            await agrees(eyes, p, decode)


async def test_a_portion_that_is_missing_is_noticed_and_everything_said_again(conversation):
    turns, _ = conversation
    async with (
        plane() as p,
        p.worker(PREFILL, "prefill-0") as prefill,
        p.worker(DECODE, "decode-0") as decode,
        router() as eyes,
    ):
        eyes.follow(prefill, decode)
        await split(prefill, decode, turns[0])
        keys = await agrees(eyes, p, prefill, decode)
        events = eyes.placer.events
        assert events is not None
        events._streams["prefill-0"].next += 1  # as if one had been lost before
        await split(prefill, decode, turns[1])
        await until(lambda: events.gaps == 1)
        assert keys < await agrees(eyes, p, prefill, decode)


async def test_a_store_that_does_not_answer_harms_nobody(conversation):
    turns, answers = conversation
    async with (
        plane() as p,
        p.worker(PREFILL, "prefill-0") as prefill,
        p.worker(DECODE, "decode-0") as decode,
        router() as eyes,
    ):
        eyes.follow(prefill, decode, store="127.0.0.1:1")
        tokens, _ = await split(prefill, decode, turns[0])
        assert tokens == answers[0]
        await agrees(eyes, p, prefill, decode)
