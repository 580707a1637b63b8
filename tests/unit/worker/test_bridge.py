"""The engine thread: order, sleep, refusal, crash. The loop is a stand-in; the thread and asyncio are real."""

import asyncio
import threading
import time
from collections import deque

import pytest

from core.clock import SystemClock
from core.errors import InternalError, InvalidRequestError, OverloadedError
from core.request import AttemptKey, TokenEvent
from engine.output import EngineLoad, StepOutput
from worker.bridge import EngineThread

KEY = AttemptKey("req", 1)


class CountingLoop:
    """A step loop whose work is a number of steps; each gives one token. `memory` False is what waits for memory."""

    def __init__(self) -> None:
        self.left: deque[int] = deque()
        self.steps = 0
        self.cancelled: list[AttemptKey] = []
        self.waiting = 0
        self.threads: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()

    def has_work(self) -> bool:
        return bool(self.left)

    def step(self, now: float) -> StepOutput:
        self.threads.add(threading.current_thread().name)
        assert self.gate.wait(10)
        token = self.left.popleft()
        if token < 0:
            raise RuntimeError("the executor is broken")
        self.steps += 1
        return StepOutput(tokens=(TokenEvent(KEY, 0, token),), num_tokens=1)

    def load(self) -> EngineLoad:
        return EngineLoad(len(self.left), self.waiting, 0)

    def cancel(self, key: AttemptKey) -> None:
        self.cancelled.append(key)


class Heard(list):
    """What reached asyncio, in order; can be waited for."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()

    def add(self, what: object) -> None:
        self.append(what)
        self.changed.set()

    def on_step(self, output: StepOutput, started: float) -> None:
        self.add(tuple(token.token_id for token in output.tokens))

    async def until(self, count: int) -> None:
        async with asyncio.timeout(5):
            while len(self) < count:
                self.changed.clear()
                await self.changed.wait()


@pytest.fixture
def loop():
    return CountingLoop()


@pytest.fixture
def heard():
    return Heard()


@pytest.fixture
async def engine(loop, heard):
    engine = EngineThread(loop, SystemClock(), inbox_max=3)
    engine.start(heard.on_step)
    yield engine
    loop.gate.set()
    assert await engine.stop(5)


def feed(*tokens: int):
    return lambda loop, now: loop.left.extend(tokens)


async def test_outcomes_come_before_the_steps_they_allow(engine, loop, heard):
    engine.call(feed(1, 2), lambda error: heard.add(("done", error)))
    await heard.until(3)
    assert heard == [("done", None), (1,), (2,)]
    assert loop.threads == {"engine"}
    assert engine.computed_tokens == 2
    assert engine.step_s.count == 2


async def test_a_refusal_is_an_outcome_and_a_mistake_an_internal_error(engine, heard):
    def refuse(loop, now):
        raise InvalidRequestError("no")

    def blunder(loop, now):
        raise KeyError("oops")

    engine.call(refuse, heard.add)
    engine.call(blunder, heard.add)
    await heard.until(2)
    assert [type(error) for error in heard] == [InvalidRequestError, InternalError]
    engine.call(feed(1), heard.add)
    await heard.until(4)


async def test_a_full_inbox_refuses_but_takes_cancels(engine, loop, heard):
    loop.gate.clear()
    engine.call(feed(1), heard.add)
    await heard.until(1)  # the thread is inside the step now, or about to be
    async with asyncio.timeout(5):
        while not loop.threads:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    for _ in range(3):
        engine.call(feed(), heard.add)
    with pytest.raises(OverloadedError):
        engine.call(feed(), heard.add)
    engine.cancel(KEY)
    loop.gate.set()
    await heard.until(5)
    assert loop.cancelled == [KEY]


async def test_a_crash_surfaces_and_nothing_is_taken_any_more(loop, heard):
    engine = EngineThread(loop, SystemClock())
    engine.start(heard.on_step)
    engine.call(feed(-1), heard.add)
    with pytest.raises(RuntimeError, match="broken"):
        async with asyncio.timeout(5):
            await engine.finished
    with pytest.raises(OverloadedError):
        engine.call(feed(1), heard.add)
    engine.cancel(KEY)
    assert await engine.stop(1)


async def test_what_waits_when_the_thread_ends_is_answered(loop, heard):
    engine = EngineThread(loop, SystemClock())
    loop.gate.clear()
    engine.start(heard.on_step)
    engine.call(feed(-1), heard.add)
    await heard.until(1)
    async with asyncio.timeout(5):
        while not loop.threads:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    engine.call(feed(1), heard.add)
    loop.gate.set()
    await heard.until(2)
    assert isinstance(heard[1], OverloadedError)
    assert await engine.stop(1)


async def test_stop_ends_an_idle_thread_and_one_in_the_middle_of_work(loop, heard):
    engine = EngineThread(loop, SystemClock())
    engine.start(heard.on_step)
    engine.call(feed(*range(100_000)), heard.add)
    await heard.until(2)
    assert await engine.stop(5)
    assert loop.left, "it did not wait for the work to end"
    assert not await_thread(engine)


def await_thread(engine: EngineThread) -> bool:
    engine._thread.join(5)
    return engine._thread.is_alive()


async def test_an_idle_engine_does_not_turn(engine, loop):
    turns = 0
    has_work = loop.has_work

    def counting() -> bool:
        nonlocal turns
        turns += 1
        return has_work()

    loop.has_work = counting
    before = time.process_time()
    await asyncio.sleep(0.2)
    assert turns <= 1
    assert time.process_time() - before < 0.1


async def test_what_waits_for_memory_is_tried_again_when_poked_or_after_a_while(engine, loop, heard):
    def starve(loop, now):
        loop.waiting = 1

    engine.call(starve, heard.add)
    await heard.until(1)
    loop.left.append(7)  # another thread freed blocks, and nobody told the engine
    await heard.until(2)
    loop.left.append(8)
    engine.poke()
    await heard.until(3)
    assert heard[1:] == [(7,), (8,)]
