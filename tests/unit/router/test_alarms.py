"""One timer for many sleepers."""

from __future__ import annotations

import asyncio

from core.clock import SystemClock
from router.alarms import Alarms
from router.timers import LoopTimers


async def test_everybody_is_woken_once_in_order_and_an_earlier_alarm_replaces_a_later_one():
    clock, rung, done = SystemClock(), [], asyncio.Event()

    def ring(name: str, now: float) -> None:
        rung.append(name)
        assert now >= due[name]
        if len(rung) == 3:
            done.set()

    alarms = Alarms(clock, LoopTimers(), ring)
    start = clock.now()
    due = {"c": start + 0.03, "a": start, "b": start + 0.01}
    alarms.set("a", start + 60.0)
    for name, at in due.items():
        alarms.set(name, at)
    alarms.set("b", start + 50.0)  # later than the one it has
    alarms.set("forgotten", start)
    alarms.forget("forgotten")
    assert (alarms.due("b"), alarms.due("forgotten")) == (due["b"], float("inf"))
    async with asyncio.timeout(10):
        await done.wait()
    assert rung == ["a", "b", "c"]
    alarms.close()


async def test_who_is_woken_may_set_the_next_alarm():
    clock, done = SystemClock(), asyncio.Event()
    left = [5]

    def ring(name: str, now: float) -> None:
        left[0] -= 1
        if left[0]:
            alarms.set(name, now)
        else:
            done.set()

    alarms = Alarms(clock, LoopTimers(), ring)
    alarms.set("x", clock.now())
    async with asyncio.timeout(10):
        await done.wait()
    alarms.close()


class CountedTimers(LoopTimers):
    """`running`: timers that will ring."""

    def __init__(self) -> None:
        self.running: set[asyncio.TimerHandle] = set()

    def later(self, delay_s, call):
        def ring() -> None:
            self.running.remove(timer)
            call()

        timer = super().later(delay_s, ring)
        self.running = {each for each in self.running if not each.cancelled()} | {timer}
        return timer

    def count(self) -> int:
        return sum(not each.cancelled() for each in self.running)


async def test_however_many_set_the_next_alarm_when_woken_there_is_one_timer():
    clock, timers, done = SystemClock(), CountedTimers(), asyncio.Event()
    left, most = [30], [0]

    def ring(name: str, now: float) -> None:
        left[0] -= 1
        alarms.set(name, now + 0.001)
        most[0] = max(most[0], timers.count())
        if left[0] <= 0:
            done.set()

    alarms = Alarms(clock, timers, ring)
    for name in "abc":
        alarms.set(name, clock.now())
    async with asyncio.timeout(10):
        await done.wait()
    assert most[0] == 1
    alarms.close()
