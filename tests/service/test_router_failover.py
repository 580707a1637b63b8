"""Workers die at every stage of a request, over real gRPC; the tokens are those of the undisturbed run."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable

import pytest
from router_rig import PROMPT, Rig, request, rig
from scripted_worker import ScriptedWorker, expected

from core.request import AttemptKey, FinishReason, WorkerRole
from router.frontend_types import TokenBatch


def kill_once(rig: Rig, watched: ScriptedWorker, victim: ScriptedWorker, stage: str, nth: int = 1) -> None:
    """When `watched` reaches `stage` for the nth time, `victim` dies there and then."""
    seen = 0

    def hook(now: str, key: AttemptKey) -> Awaitable[None] | None:
        nonlocal seen
        seen += now == stage
        if now != stage or seen != nth:
            return None
        watched.hook = lambda stage, key: None
        return _kill(rig, victim)

    watched.hook = hook


async def _kill(rig: Rig, victim: ScriptedWorker) -> None:
    killing = asyncio.create_task(victim.die(), name=f"kill {victim.worker_id}")
    rig.killing.append(killing)
    await asyncio.shield(killing)


STAGES = [
    ("decode-0", "reserve", 1, "decode-0"),
    ("decode-0", "reserve", 1, "prefill-0"),
    ("prefill-0", "start", 1, "prefill-0"),
    ("prefill-0", "start", 1, "decode-0"),
    ("prefill-0", "opened", 1, "prefill-0"),
    ("prefill-0", "opened", 1, "decode-0"),
    ("prefill-0", "first", 1, "prefill-0"),
    ("prefill-0", "first", 1, "decode-0"),
    ("prefill-0", "done", 1, "prefill-0"),
    ("prefill-0", "done", 1, "decode-0"),
    ("decode-0", "joined", 1, "decode-0"),
    ("decode-0", "joined", 1, "prefill-0"),
    ("decode-0", "token", 1, "decode-0"),
    ("decode-0", "token", 9, "decode-0"),
    ("decode-0", "token", 9, "prefill-0"),
    ("decode-0", "token", 23, "decode-0"),
]


@pytest.mark.parametrize(("watched", "stage", "nth", "victim"), STAGES, ids=lambda v: str(v))
async def test_a_worker_dies_at_any_stage(watched: str, stage: str, nth: int, victim: str):
    async with rig(prefill=2, decode=2) as r:
        kill_once(r, r.workers[watched], r.workers[victim], stage, nth)
        result = await r.generate(request(24))
        assert result.ids() == expected(PROMPT, 7, 24)
        assert result.reason() is FinishReason.LENGTH
        assert result.finished is not None
        assert r.workers[victim].dead
        failovers = {0} if (victim, stage) == ("prefill-0", "token") else {1}  # decode had everything
        if (victim, stage) == ("prefill-0", "joined"):
            failovers = {0, 1}  # decode has everything too; which session the router hears first is open
        assert result.finished.failovers in failovers
        await r.all_free()


@pytest.mark.parametrize("nth", [1, 5, 24])
async def test_a_colocated_worker_dies(nth: int):
    async with rig(0, 0, colocated=2) as r:
        kill_once(r, r.workers["colocated-0"], r.workers["colocated-0"], "token", nth)
        result = await r.generate(request(24))
        assert result.ids() == expected(PROMPT, 7, 24)
        assert result.finished is not None
        assert result.finished.failovers == 1
        assert result.finished.placement.decode == "colocated-1"
        await r.all_free()


async def test_eight_streams_survive_the_only_decode_worker():
    """It is replaced under the same name with a new epoch, as the controller does."""
    async with rig(step_s=0.001) as r:
        kill_once(r, r.workers["decode-0"], r.workers["decode-0"], "token", 50)
        streams = [asyncio.create_task(r.generate(request(24, seed))) for seed in range(8)]
        await r.workers["decode-0"].until(lambda: r.workers["decode-0"].dead)
        await r.add("decode-0", WorkerRole.DECODE, epoch=2)
        for seed, stream in enumerate(streams):
            result = await stream
            assert result.ids() == expected(PROMPT, seed, 24)
            assert result.finished is not None
            assert result.finished.failovers >= 1
        await r.all_free()


async def test_the_stream_goes_on_where_it_was():
    """Tokens that the client has seen are neither repeated nor taken back."""
    async with rig(decode=2) as r:
        kill_once(r, r.workers["decode-0"], r.workers["decode-0"], "token", 12)
        seen: list[int] = []
        async for part in r.front.generate(request(24)):
            if isinstance(part, TokenBatch):
                seen += [token.position for token in part.tokens]
        assert seen == list(range(24))


async def test_a_victim_of_memory_shortage_is_placed_again():
    async with rig(decode=2) as r:
        decode = r.workers["decode-0"]

        def hook(stage: str, key: AttemptKey) -> Awaitable[None] | None:
            if stage != "token" or len(decode.seen) > 2:
                return None
            decode.hook = lambda stage, key: None
            return _give_back(decode, key)

        decode.hook = hook
        result = await r.generate(request(24))
        assert result.ids() == expected(PROMPT, 7, 24)
        assert result.finished is not None
        assert result.finished.failovers == 1
        await r.all_free()


async def _give_back(decode: ScriptedWorker, key: AttemptKey) -> None:
    asyncio.get_running_loop().call_soon(lambda: asyncio.ensure_future(decode.give_back(key)))
    await asyncio.Event().wait()  # until cancelled by the giving back


@pytest.mark.parametrize("seed", range(3))
async def test_deaths_at_random_leave_nothing_behind(seed: int):
    rng = random.Random(seed)
    async with rig(prefill=3, decode=3, step_s=0.001) as r:
        for name in rng.sample(sorted(r.workers), 3):
            if name.endswith("-0"):
                continue
            stage = rng.choice(("reserve", "token", "joined") if name.startswith("decode") else ("start", "first", "done"))
            kill_once(r, r.workers[name], r.workers[name], stage, rng.randrange(1, 8))
        results = await asyncio.gather(*(r.generate(request(24, s)) for s in range(16)))
        for s, result in enumerate(results):
            assert result.ids() == expected(PROMPT, s, 24)
        await r.all_free()
