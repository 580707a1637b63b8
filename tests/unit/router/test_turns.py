"""Readers are woken in order, a few per round of the loop."""

from __future__ import annotations

import asyncio

from router.turns import PER_ROUND, Turns


async def test_readers_are_woken_in_order_a_few_per_round():
    loop, turns, woken = asyncio.get_running_loop(), Turns(), []
    waiters = [loop.create_future() for _ in range(2 * PER_ROUND + 3)]
    for number, waiter in enumerate(waiters):
        waiter.add_done_callback(lambda _, number=number: woken.append(number))
        turns.wake(waiter)
    assert not any(waiter.done() for waiter in waiters)
    rounds = []
    while len(woken) < len(waiters):
        await asyncio.sleep(0)
        rounds.append(sum(waiter.done() for waiter in waiters))
    assert woken == list(range(len(waiters)))
    assert {after - before for before, after in zip([0, *rounds], rounds, strict=False)} <= {0, 3, PER_ROUND}


async def test_who_comes_later_and_who_has_gone_do_not_stop_the_line():
    loop, turns = asyncio.get_running_loop(), Turns()
    gone, stays, late = (loop.create_future() for _ in range(3))
    turns.wake(gone)
    turns.wake(stays)
    gone.cancel()
    await stays
    turns.wake(late)
    await late
