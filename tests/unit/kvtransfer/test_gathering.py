"""When news of blocks are said: soon after the last of them, and never long after the first."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.gathering import LATEST_S, QUIET_S, due_at, gathered


@pytest.mark.parametrize(
    ("first_at", "latest_at", "due"),
    [
        (10.0, 10.0, 10.0 + QUIET_S),  # one piece of news
        (10.0, 10.3, 10.3 + QUIET_S),  # the next chunk came a little later
        (10.0, 10.9, 10.0 + LATEST_S),  # they come without a pause
        (10.0, 99.0, 10.0 + LATEST_S),
    ],
)
def test_when_news_are_due(first_at: float, latest_at: float, due: float) -> None:
    assert due_at(first_at, latest_at) == pytest.approx(due)


@given(st.floats(0, 1e6), st.floats(0, 100))
def test_never_before_it_is_quiet_unless_it_is_late(first_at: float, for_s: float) -> None:
    due = due_at(first_at, first_at + for_s)
    assert due <= first_at + LATEST_S
    assert due >= first_at + for_s + QUIET_S or due == first_at + LATEST_S


async def test_news_without_a_pause_are_said_all_the_same() -> None:
    news, said = asyncio.Event(), asyncio.Event()
    news.set()

    async def come() -> None:
        while not said.is_set():
            news.set()
            await asyncio.sleep(0.01)

    coming = asyncio.create_task(come())
    async with asyncio.timeout(20):
        await gathered(news)
    said.set()
    await coming


async def test_what_came_last_is_not_left_for_the_next_time() -> None:
    news = asyncio.Event()
    news.set()
    async with asyncio.timeout(20):
        await gathered(news)
    assert not news.is_set()
