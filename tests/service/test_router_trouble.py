"""Full workers, silent workers, hung workers, lagging readers, our own mistakes: what waits, what ends, what is unharmed."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from router_rig import LIMITS, PROMPT, Collected, request, rig
from scripted_worker import expected

from core.errors import (
    DeadlineExceededError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    TandemError,
    UnavailableError,
)
from core.request import AttemptKey, TokenEvent, WorkerRole
from router.choice import ChoiceText
from router.frontend_types import Token, TokenBatch


async def test_refused_requests_wait_and_are_served_in_turn():
    async with rig(room=2, step_s=0.001) as r:
        results = await asyncio.gather(*(r.generate(request(seed=s)) for s in range(12)))
        for seed, result in enumerate(results):
            assert result.ids() == expected(PROMPT, seed, 16)
        asked = sum(kind == "reserve" for kind, _ in r.workers["decode-0"].seen)
        assert asked < 60, "a refused request waits for room, it does not ask again and again"
        await r.all_free()


async def test_a_full_queue_refuses_at_once():
    async with rig(room=1, step_s=0.001, max_queue=2) as r:
        running = r.front.generate(request(max_tokens=4000))
        await anext(running)
        waiting = [asyncio.create_task(r.generate(request(seed=s))) for s in range(2)]
        await r.workers["decode-0"].until(lambda: sum(k == "reserve" for k, _ in r.workers["decode-0"].seen) >= 2)
        await r.until(lambda: len(r.dispatcher.queue) == 2)
        with pytest.raises(OverloadedError) as caught:
            await r.generate(request(seed=9))
        assert caught.value.retry_after_s is not None
        await running.aclose()
        for seed, task in enumerate(waiting):
            assert (await task).ids() == expected(PROMPT, seed, 16)
        await r.all_free()


async def test_waiting_ends_with_the_queue_timeout():
    async with rig(room=1, limits=replace(LIMITS, queue_timeout_s=0.2)) as r:
        blocked = asyncio.Event()
        r.workers["prefill-0"].hook = lambda stage, key: blocked.wait() if stage == "first" else None
        running = asyncio.create_task(r.generate(request()))
        await r.workers["prefill-0"].until(lambda: bool(r.workers["prefill-0"].held))
        with pytest.raises(OverloadedError, match="no place within"):
            await r.generate(request(seed=8))
        blocked.set()
        assert (await running).ids() == expected(PROMPT, 7, 16)
        await r.all_free()


async def test_without_workers_a_request_waits_for_one():
    async with rig(prefill=1, decode=1, limits=replace(LIMITS, queue_timeout_s=0.2)) as r:
        await r.workers["decode-0"].die()
        r.announce()
        with pytest.raises(UnavailableError, match="no decode worker"):
            await r.generate(request())
        assert not r.front.ready()


async def test_the_request_timeout_ends_what_hangs():
    async with rig(limits=replace(LIMITS, request_timeout_s=0.3)) as r:
        never = asyncio.Event()
        r.workers["decode-0"].hook = lambda stage, key: never.wait() if stage == "token" else None
        with pytest.raises(DeadlineExceededError):
            await r.generate(request())
        await r.all_free()


async def test_a_worker_that_does_not_answer_is_passed_over():
    async with rig(decode=2, limits=replace(LIMITS, answer_timeout_s=0.2)) as r:
        never = asyncio.Event()
        r.workers["decode-0"].hook = lambda stage, key: never.wait() if stage == "reserve" else None
        result = await r.generate(request())
        assert result.ids() == expected(PROMPT, 7, 16)
        assert result.finished is not None
        assert result.finished.placement.decode == "decode-1"
        never.set()
        await r.all_free()


async def test_an_error_for_good_reaches_the_user():
    async with rig() as r:
        prefill = r.workers["prefill-0"]

        async def refuse(key: AttemptKey) -> None:
            prefill.fail(key, "invalid_request", "not like this", retryable=False)
            await asyncio.Event().wait()

        prefill.hook = lambda stage, key: refuse(key) if stage == "start" else None
        with pytest.raises(InvalidRequestError, match="not like this"):
            await r.generate(request())
        prefill.hook = lambda stage, key: None
        assert (await r.generate(request())).ids() == expected(PROMPT, 7, 16), "others are unharmed"


async def test_a_reader_that_lags_gets_larger_parts():
    async with rig() as r:
        stream = r.front.generate(request(max_tokens=300))
        await anext(stream)
        await r.until(lambda: len(r.dispatcher) == 0)
        sizes = [len(p.tokens) async for p in stream if isinstance(p, TokenBatch)]
        assert sum(sizes) == 300
        assert len(sizes) == 1
        await r.all_free()


async def test_a_reader_that_never_reads_is_cancelled():
    async with rig(slow_client_s=0.2, step_s=0.001) as r:
        asleep = r.front.generate(request(max_tokens=4000))
        await anext(asleep)
        decode = r.workers["decode-0"]
        await decode.until(lambda: bool(decode.held))
        await r.workers["decode-0"].until(lambda: not r.workers["decode-0"].held)
        with pytest.raises(TandemError, match="read nothing"):
            _ = [part async for part in asleep]
        await r.all_free()


async def test_a_burst_spreads_over_the_workers():
    async with rig(prefill=4, decode=4) as r:
        hold = asyncio.Event()
        for worker in r.workers.values():
            worker.hook = lambda stage, key: hold.wait() if stage == "start" else None
        tasks = [asyncio.create_task(r.generate(request(seed=s))) for s in range(16)]
        for worker in r.workers.values():
            await worker.until(lambda worker=worker: len(worker.held) == 4)  # type: ignore[misc]
        hold.set()
        await asyncio.gather(*tasks)
        await r.all_free()


async def test_a_mistake_of_ours_ends_one_request_and_harms_no_other(monkeypatch: pytest.MonkeyPatch):
    async with rig(step_s=0.001) as r:
        whole = ChoiceText.take

        def take(self: ChoiceText, tokens: tuple[TokenEvent, ...]) -> list[Token]:
            if any(t.key.request_id == "unlucky" and t.position == 3 for t in tokens):
                raise ZeroDivisionError("a bug")
            return whole(self, tokens)

        monkeypatch.setattr(ChoiceText, "take", take)
        unlucky = asyncio.create_task(r.generate(request(max_tokens=500, request_id="unlucky")))
        lucky = await asyncio.gather(*(r.generate(request(seed=s)) for s in range(4)))
        for seed, result in enumerate(lucky):
            assert result.ids() == expected(PROMPT, seed, 16)
        with pytest.raises(InternalError, match="its log"):
            await unlucky
        await r.all_free()


async def test_attempts_are_counted_by_outcome():
    async with rig(room=1, step_s=0.001, decode=2) as r:
        await asyncio.gather(*(r.generate(request(seed=s)) for s in range(4)))
        running = r.front.generate(request(max_tokens=4000))
        await anext(running)
        await running.aclose()
        lost = asyncio.create_task(r.generate(request(max_tokens=100)))
        await r.workers["decode-0"].until(lambda: bool(r.workers["decode-0"].held))
        await r.workers["decode-0"].die()
        await lost
        counted = r.dispatcher.attempts
        assert (counted["length"], counted["cancelled"], counted["lost"]) == (5, 1, 1)
        assert counted["refused"] > 0
        assert r.dispatcher.failovers == 1


class FreezingProxy:
    """Passes bytes on until it freezes: then the connections stay open and nothing moves, as with a stopped process."""

    def __init__(self, target: str) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._thawed = asyncio.Event()
        self._thawed.set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> str:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def freeze(self) -> None:
        self._thawed.clear()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back, forth = await asyncio.open_connection(self._host, self._port)
        for source, sink in ((reader, forth), (back, writer)):
            self._tasks.add(asyncio.create_task(self._pass(source, sink), name="proxy"))

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                await self._thawed.wait()
                sink.write(data)
                await sink.drain()
        finally:
            sink.close()


async def test_a_worker_that_hangs_in_mid_stream_is_noticed():
    """Nothing closes, nothing answers: the session's keepalive finds out."""
    async with rig(decode=1, step_s=0.01, limits=replace(LIMITS, request_timeout_s=60.0)) as r:
        hung = r.workers["decode-0"]
        proxy = FreezingProxy(hung.address)
        async with proxy as address:
            hung.address, hung.epoch = address, 2
            r.announce()
            await r.until(lambda: r.dispatcher.view.workers["decode-0"].epoch == 2 and "decode-0" in r.links.connected())
            stream = r.front.generate(request(max_tokens=200))
            parts = [await anext(stream) for _ in range(10)]
            proxy.freeze()
            await r.add("decode-1", WorkerRole.DECODE)
            result = Collected([*parts, *[part async for part in stream]])
        assert result.ids() == expected(PROMPT, 7, 200)
        assert result.finished is not None
        assert result.finished.placement.decode == "decode-1"
        await hung.die()
