"""One follower's place in an export: what it has been told, and what wakes it."""

from __future__ import annotations

import asyncio

from kvtransfer.handoff import Export, News


class Follower:
    """One follower's place in an export. Only the newest follower of an export is told anything."""

    def __init__(self, export: Export) -> None:
        self.export = export
        self._told = 0
        self._told_closing = False
        self._replaced = False
        self._renewals = 0
        self._wake = asyncio.Event()

    async def news(self) -> tuple[News, int]:
        """Waits for what was not told yet and for renewals to acknowledge (how many). The caller sets the deadline."""
        while True:
            news = News(ended="another follower took over") if self._replaced else self._untold()
            renewals, self._renewals = self._renewals, 0
            if news != News() or renewals:
                self._told += len(news.records)
                self._told_closing = self._told_closing or news.closing is not None
                return news, renewals
            self._wake.clear()
            await self._wake.wait()

    def renewed(self) -> None:
        self._renewals += 1
        self.wake()

    def replace(self) -> None:
        self._replaced = True
        self.wake()

    def wake(self) -> None:
        self._wake.set()

    def _untold(self) -> News:
        return self.export.news(self._told, self._told_closing)
