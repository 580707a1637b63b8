"""Several streams of parts as one, for a call with several prompts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from router.frontend_types import Part

Numbered = tuple[int, Part]
"""A part and the number of the stream it came from."""
_QUEUED_PER_STREAM = 4


async def merged(streams: Sequence[AsyncGenerator[Part, None]]) -> AsyncGenerator[Numbered, None]:
    """Parts of all streams as they come. The first error ends them all; closing this closes them all."""
    if len(streams) == 1:  # no task and no queue between the tokens and the socket
        async with aclosing(streams[0]) as parts:
            async for part in parts:
                yield 0, part
        return
    queue: asyncio.Queue[Numbered | BaseException | None] = asyncio.Queue(_QUEUED_PER_STREAM * len(streams))
    pumps = [asyncio.create_task(_pump(i, s, queue), name=f"http prompt {i}") for i, s in enumerate(streams)]
    running = len(pumps)
    try:
        while running:
            item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(number: int, stream: AsyncGenerator[Part, None], queue: asyncio.Queue[Numbered | BaseException | None]) -> None:
    try:
        async with aclosing(stream) as parts:
            async for part in parts:
                await queue.put((number, part))
    except Exception as error:
        await queue.put(error)
    else:
        await queue.put(None)
