"""Tells routers which blocks a store has, in memory and on disk: a stream each, since stores have no sessions."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

from core.clock import Clock
from core.errors import OverloadedError, StaleEpochError
from core.kv_changes import ChangeFeed, KvChanges
from kvtransfer.disk_changes import DiskChanges
from kvtransfer.store_node import StoreNode
from kvtransfer.store_plane import StorePlane

LISTENERS_MAX = 64
"""Each costs every change of a block a little."""


class StoreFeed:
    """One per store, on its loop. Nothing piles up for a listener that reads slowly but one entry per block."""

    def __init__(self, store: StoreNode, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._listeners: set[asyncio.Event] = set()

    def __len__(self) -> int:
        return len(self._listeners)

    def poke(self) -> None:
        """Called a few times per second: blocks may have come or gone."""
        for news in self._listeners:
            news.set()

    async def portions(self, epoch: int, stream: int) -> AsyncGenerator[KvChanges, None]:
        """Until the blocks become those of another layout. Raises StaleEpochError, OverloadedError beyond LISTENERS_MAX."""
        if epoch != self._store.epoch:
            raise StaleEpochError(f"this store is of epoch {self._store.epoch}, the call is for epoch {epoch}")
        if len(self._listeners) >= LISTENERS_MAX:
            raise OverloadedError(f"{LISTENERS_MAX} routers listen to this store; it serves no more", retry_after_s=5.0)
        news = asyncio.Event()
        self._listeners.add(news)
        try:
            while (plane := self._store.plane) is None:
                await _next(news)
            async with contextlib.aclosing(self._of(plane, stream, news)) as portions:
                async for changes in portions:
                    yield changes
        finally:
            self._listeners.discard(news)

    async def _of(self, plane: StorePlane, stream: int, news: asyncio.Event) -> AsyncGenerator[KvChanges, None]:
        feed, disk = ChangeFeed(plane.inventory, stream), DiskChanges(plane.disk)
        try:
            while self._store.plane is plane:
                came, went = await disk.look(self._clock.now())
                disk.told(came, went)
                feed.disk(came, went)
                while (changes := feed.next()) is not None:
                    yield changes
                await _next(news)
        finally:
            feed.close()


async def _next(news: asyncio.Event) -> None:
    await news.wait()
    news.clear()
