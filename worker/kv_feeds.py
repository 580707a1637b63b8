"""Tells the routers that ask which blocks are here, on their sessions, behind the tokens."""

from __future__ import annotations

import asyncio

from core.inventory import Inventory
from core.kv_changes import ChangeFeed
from worker.attempts import Peer
from worker.links import RouterLinks

GATHER_S = 0.25
"""A prompt's blocks come chunk by chunk: one message for many costs everybody a fraction."""
BACKLOG_MAX = 8
"""Events that a router has yet to read, above which it hears of blocks later: tokens come first."""
ROUTERS_MAX = 64


class KvFeeds:
    """One per worker, on the asyncio thread. A router hears what changed in total since it last heard, however slow it reads,
    so nothing piles up here but one entry per block. A stream ends with its session; the next one begins anew.
    """

    def __init__(self, inventory: Inventory, links: RouterLinks) -> None:
        self._inventory = inventory
        self._links = links
        self._feeds: dict[Peer, ChangeFeed] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._feeds)

    def follow(self, peer: Peer, stream: int) -> None:
        """Begins from nothing, soon. Of more than ROUTERS_MAX the newest are told nothing: their index stays cold."""
        self._end(peer)
        if len(self._feeds) < ROUTERS_MAX:
            self._feeds[peer] = ChangeFeed(self._inventory, stream)
            self._set_timer(0.0)

    def poke(self) -> None:
        """Blocks may have come or gone. Returns at once."""
        if self._feeds and self._timer is None:
            self._set_timer(GATHER_S)

    def close(self) -> None:
        for peer in list(self._feeds):
            self._end(peer)
        if self._timer is not None:
            self._timer.cancel()

    def _set_timer(self, delay_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._tell)

    def _tell(self) -> None:
        self._timer = None
        unsaid = False
        for peer, feed in list(self._feeds.items()):
            backlog = self._links.backlog(peer)
            if backlog is None:
                self._end(peer)
                continue
            while backlog < BACKLOG_MAX and (changes := feed.next()) is not None:
                self._links.reply(peer, changes)
                backlog += 1
            unsaid = unsaid or backlog >= BACKLOG_MAX
        if unsaid:
            self._set_timer(GATHER_S)

    def _end(self, peer: Peer) -> None:
        feed = self._feeds.pop(peer, None)
        if feed is not None:
            feed.close()
