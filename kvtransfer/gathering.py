"""When to say what came and went: a prompt's blocks come chunk by chunk, and one message for many costs a fraction."""

from __future__ import annotations

import asyncio

QUIET_S = 0.25
"""Nothing more has come for so long: the prompt is probably done, and nobody's first token waits for the processor."""
LATEST_S = 1.0
"""Said by then, however much goes on coming."""


def due_at(first_at: float, latest_at: float) -> float:
    """When news that came first and last at these times are to be said."""
    return min(latest_at + QUIET_S, first_at + LATEST_S)


async def gathered(news: asyncio.Event) -> None:
    """Called once `news` is set; returns when it is time to say them, with the event cleared."""
    loop = asyncio.get_running_loop()
    first_at = latest_at = loop.time()
    while True:
        news.clear()
        try:
            async with asyncio.timeout_at(due_at(first_at, latest_at)):
                await news.wait()
        except TimeoutError:
            news.clear()
            return
        latest_at = loop.time()
