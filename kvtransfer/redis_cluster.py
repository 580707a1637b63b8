"""A Redis Cluster as one link: which master has a shard, asked of the cluster and again when it has changed.

redis-py's own client of clusters encodes and routes every key of a command by itself, which takes longer than the answer, and
several calls at once while it connects get in each other's way. A shard lies in one slot, so all there is to know is a table.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from redis import exceptions
from redis.crc import key_slot

from kvtransfer.directory import DirectoryError
from kvtransfer.redis_layout import Buckets, Lookup
from kvtransfer.redis_link import Calls, SingleLink, direct_link
from kvtransfer.redis_scripts import Script
from kvtransfer.redis_url import RedisTarget

_T = TypeVar("_T")
_Address = tuple[str, int]


class ClusterLink:
    """A call that meets a moved slot asks the right master; one that fails otherwise makes the next call ask who that is."""

    def __init__(self, target: RedisTarget, timeout_s: float) -> None:
        self._target = target
        self._name = str(target)
        self._timeout_s = timeout_s
        self._calls = Calls(self._name)
        self._links: dict[_Address, SingleLink] = {}
        self._slots: list[tuple[int, int, _Address]] = []  # first, last, master
        self._known = False
        self._asking = asyncio.Lock()
        self._closing: set[asyncio.Task[None]] = set()

    async def read(
        self, prefix: bytes, lookup: Lookup, script: Script, args: Sequence[Any], timeout_s: float
    ) -> tuple[Buckets, Any]:
        return await self._at_master(prefix, lambda link: link.read(prefix, lookup, script, args, timeout_s), timeout_s)

    async def run(self, prefix: bytes, script: Script, args: Sequence[Any], timeout_s: float) -> Any:
        return await self._at_master(prefix, lambda link: link.run(prefix, script, args, timeout_s), timeout_s)

    async def _described(self) -> tuple[Any, _Address]:
        """`CLUSTER SLOTS` of the first server that answers, and which one that is."""
        error = DirectoryError(f"redis {self._name}: no server to ask")
        for address in dict.fromkeys((*self._links, *self._target.hosts)):
            try:
                return await self._link(address).command(("CLUSTER", "SLOTS"), self._timeout_s / 2), address
            except DirectoryError as failed:
                error = failed
        raise error

    async def close(self) -> None:
        await self._calls.end()
        closing = [asyncio.ensure_future(link.close()) for link in self._links.values()]
        self._links.clear()
        await asyncio.gather(*closing, *self._closing)

    async def _at_master(self, prefix: bytes, call: Callable[[SingleLink], Awaitable[_T]], timeout_s: float) -> _T:
        return await self._calls.run(lambda: self._twice(key_slot(prefix), call), timeout_s)

    async def _twice(self, slot: int, call: Callable[[SingleLink], Awaitable[_T]]) -> _T:
        try:
            return await call(await self._master(slot))
        except DirectoryError as error:
            self._known = False
            if not isinstance(error.__cause__, exceptions.MovedError):
                raise
        return await call(await self._master(slot))

    async def _master(self, slot: int) -> SingleLink:
        async with self._asking:
            if not self._known:
                await self._ask()
        for first, last, address in self._slots:
            if first <= slot <= last:
                return self._link(address)
        raise DirectoryError(f"redis {self._name}: no server has slot {slot}")

    async def _ask(self) -> None:
        rows, asked = await self._described()
        try:
            self._slots = [(int(row[0]), int(row[1]), (row[2][0].decode() or asked[0], int(row[2][1]))) for row in rows]
        except (AttributeError, IndexError, TypeError, ValueError):
            raise DirectoryError(f"redis {self._name}: it does not describe its slots as a cluster does") from None
        self._known = True
        for address in self._links.keys() - {address for *_, address in self._slots}:
            task = asyncio.create_task(self._links.pop(address).close(), name="redis link close")
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def _link(self, address: _Address) -> SingleLink:
        link = self._links.get(address)
        if link is None:
            link = self._links[address] = direct_link(self._target, *address, self._timeout_s)
        return link
