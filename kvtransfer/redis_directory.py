"""The directory in Redis: shared by all nodes, outlives the controller, forgets like all soft state.

A lookup is one round trip: `HMGET` of the keys' buckets and, in the same pipeline, the records of the nodes that were met
lately. Layout and scripts: redis_layout.py, redis_scripts.py. Whatever is wrong with Redis, a call ends within its deadline
with a DirectoryError, and after a failure lookups leave Redis alone for a moment. A Redis that lost something (it restarted
empty, a replica took over that had not heard all) makes `join` answer False, and everything is announced again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from itertools import chain, repeat, takewhile
from typing import Any

from core.blocks import KEY_BYTES, BlockKey
from core.clock import Clock, SystemClock
from core.errors import InvalidRequestError, StaleEpochError
from kvtransfer.breaker import Breaker
from kvtransfer.directory import (
    LOCATE_KEYS_MAX,
    DirectoryError,
    DuplicateNodeError,
    Holder,
    Located,
    NodeRecord,
    Tier,
    pack,
    pack_deltas,
)
from kvtransfer.directory_wire import node_from_bytes, node_to_bytes
from kvtransfer.redis_layout import CLUSTER_SHARDS, SWEEP_BUCKETS, Buckets, Layout, Lookup, read_words
from kvtransfer.redis_link import has_answered, open_link
from kvtransfer.redis_scripts import ANNOUNCE, JOIN, LEAVE, NODES, RECORDS, SWEEP, Script
from kvtransfer.redis_url import parse_redis_url

log = logging.getLogger(__name__)

ANNOUNCE_KEYS = 2048
"""Of one script: more would keep Redis from others for too long."""
LOCATE_KEYS = 4096
"""Of one round trip."""
NUMBERS_MAX = 64
"""Nodes asked about along with every lookup."""
SWEEP_PAUSE_S = 0.05
_EPOCH_DIGITS = 20

_Incarnation = tuple[str, int]
_Records = dict[int, NodeRecord | None]
_Run = tuple[tuple[Holder, ...], int]  # holders, of how many keys in a row


class RedisDirectory:
    """Lives in one asyncio loop. Raises ConfigError when made with a URL that is none."""

    def __init__(self, url: str, *, timeout_s: float, clock: Clock | None = None) -> None:
        target = parse_redis_url(url)
        self._name = str(target)
        self._timeout_s = timeout_s
        self._clock = clock or SystemClock()
        self._layout = Layout(target.prefix, CLUSTER_SHARDS if target.kind == "cluster" else 1)
        self._link = open_link(target, timeout_s)
        self._breaker = Breaker()
        self._acked: dict[_Incarnation, list[int]] = {}  # announcements taken, as each shard said
        self._doubted: set[_Incarnation] = set()  # an announcement failed, nobody knows how much of it was taken
        self._met: list[dict[int, None]] = [{} for _ in range(self._layout.shards)]  # node numbers, the latest last
        self._decoded: dict[bytes, NodeRecord] = {}
        self._sweeper: asyncio.Task[None] | None = None
        self._closed = False

    async def join(self, record: NodeRecord, ttl_s: float) -> bool:
        source = record.source
        incarnation = (source.worker_id, source.epoch)
        if incarnation in self._doubted:
            await self.leave(*incarnation)
        acked = self._acked.setdefault(incarnation, [0] * self._layout.shards)
        who = (source.worker_id, _epoch(source.epoch), source.grpc_address, node_to_bytes(record), int(ttl_s * 1000))
        replies = await self._everywhere(JOIN, [(*who, acked[shard], self._layout.buckets) for shard in range(len(acked))])
        for status, detail, _ in replies:
            if status == b"stale":
                raise StaleEpochError(f"{source.worker_id} epoch {source.epoch} was superseded by epoch {int(detail)}")
            if status == b"taken":
                raise DuplicateNodeError(
                    f"{source.worker_id} epoch {source.epoch} is at {detail.decode(errors='replace')}; {source.grpc_address} "
                    "is refused. Give each node an id of its own"
                )
        for shard, (status, _, _) in enumerate(replies):
            if status == b"new":
                acked[shard] = 0
        self._doubted.discard(incarnation)
        if any(dead for _, _, dead in replies):
            self._sweep_soon()
        return all(status == b"known" for status, _, _ in replies)

    async def leave(self, worker_id: str, epoch: int) -> None:
        await self._everywhere(LEAVE, [(worker_id, _epoch(epoch), self._layout.buckets)] * self._layout.shards)
        self._acked.pop((worker_id, epoch), None)

    async def announce(
        self, worker_id: str, epoch: int, added: Sequence[tuple[BlockKey, Tier]], removed: Sequence[tuple[BlockKey, Tier]]
    ) -> bool:
        known = False
        try:
            for delta in pack_deltas(added, removed, ANNOUNCE_KEYS):
                if not await self._announce(worker_id, epoch, [self._layout.packed(keys) for keys in delta]):
                    break
            else:
                known = True
        except BaseException:
            self._doubted.add((worker_id, epoch))
            raise
        return known

    async def locate(self, keys: Sequence[BlockKey]) -> Located:
        packed = pack(keys[:LOCATE_KEYS_MAX])
        self._check_open()
        if not self._breaker.allows(self._clock.now()):
            raise DirectoryError(f"redis {self._name} did not answer lately; it is left alone for a moment")
        known: dict[str, NodeRecord] = {}
        runs: list[_Run] = []
        for start in range(0, len(packed), LOCATE_KEYS * KEY_BYTES):
            piece = packed[start : start + LOCATE_KEYS * KEY_BYTES]
            found = await self._watched(self._locate(piece, known))
            runs += found
            if sum(count for _, count in found) * KEY_BYTES < len(piece):
                break
        holders: list[tuple[Holder, ...]] = []
        for held, count in runs:
            holders += [held] * count
        return Located({holder.worker_id: known[holder.worker_id] for held, _ in runs for holder in held}, holders)

    async def nodes(self) -> list[NodeRecord]:
        found = {}
        for shard in await self._everywhere(NODES, [()] * self._layout.shards):
            for data in shard:
                record = self._record(data) if data else None
                if record is not None:
                    found[record.source.worker_id] = record
        return [found[worker_id] for worker_id in sorted(found)]

    async def close(self) -> None:
        self._closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)
        await self._link.close()

    # ---- announcing ------------------------------------------------------------------------------------------------------

    async def _announce(self, worker_id: str, epoch: int, delta: list[dict[int, bytes]]) -> bool:
        shards = sorted(set().union(*delta)) or list(range(self._layout.shards))
        who = (worker_id, _epoch(epoch))
        calls = [self._run(shard, ANNOUNCE, (*who, *(part.get(shard, b"") for part in delta))) for shard in shards]
        taken = await _all(calls)
        acked = self._acked.setdefault((worker_id, epoch), [0] * self._layout.shards)
        for shard, count in zip(shards, taken, strict=True):
            acked[shard] = max(acked[shard], count)
        return bool(min(taken) >= 0)

    def _sweep_soon(self) -> None:
        if self._sweeper is None or self._sweeper.done():
            self._sweeper = asyncio.create_task(self._sweep(), name="redis directory sweep")

    async def _sweep(self) -> None:
        """Cuts out what dead nodes held, a little at a time; whoever joins next goes on where this ends."""
        args = (SWEEP_BUCKETS, self._layout.buckets)
        left = 1
        while left:
            try:
                left = sum(await self._everywhere(SWEEP, [args] * self._layout.shards))
            except DirectoryError as error:
                log.debug("sweeping ended: %s", error.message)
                return
            await asyncio.sleep(SWEEP_PAUSE_S)

    # ---- looking up ------------------------------------------------------------------------------------------------------

    async def _locate(self, keys: bytes, known: dict[str, NodeRecord]) -> list[_Run]:
        """Holders of the prefix of `keys` that is held; adds to `known` the newest incarnation of each node that was met."""
        lookups = self._layout.lookup(keys)
        answers = await _all([self._read(shard, lookup) for shard, lookup in lookups.items()])
        read = [lookup.read(buckets) for lookup, (buckets, _) in zip(lookups.values(), answers, strict=True)]
        for shard, runs, (_, records) in zip(lookups, read, answers, strict=True):
            for record in (await self._complete(shard, {words for words, _ in runs}, records)).values():
                name = record.source.worker_id
                if name not in known or known[name].source.epoch < record.source.epoch:
                    known[name] = record
        resolved = [
            [(_holders(words, records, known), count) for words, count in runs]
            for runs, (_, records) in zip(read, answers, strict=True)
        ]
        if len(resolved) == 1:
            return list(takewhile(lambda run: run[0], resolved[0]))
        return _merged([lookup.places for lookup in lookups.values()], resolved, len(keys) // KEY_BYTES)

    async def _read(self, shard: int, lookup: Lookup) -> tuple[Buckets, _Records]:
        numbers = list(self._met[shard])
        prefix = self._layout.prefixes[shard]
        buckets, found = await self._link.read(prefix, lookup, RECORDS, numbers, self._timeout_s)
        return buckets, self._learn(shard, numbers, found)

    async def _complete(self, shard: int, distinct: set[bytes], records: _Records) -> dict[int, NodeRecord]:
        """Asks for nodes that were not met before, and returns those among `distinct` that are alive."""
        numbers = {number for words in distinct for number, _ in read_words(words)}
        missing = sorted(numbers - records.keys())
        if missing:
            records |= self._learn(shard, missing, await self._run(shard, RECORDS, missing))
        return {number: record for number in numbers if (record := records[number]) is not None}

    def _learn(self, shard: int, numbers: list[int], found: list[bytes]) -> _Records:
        met = self._met[shard]
        records: _Records = {}
        for number, data in zip(numbers, found, strict=True):
            records[number] = self._record(data) if data else None
            met.pop(number, None)
            if data:
                met[number] = None
        while len(met) > NUMBERS_MAX:
            del met[next(iter(met))]
        return records

    def _record(self, data: bytes) -> NodeRecord | None:
        record = self._decoded.get(data)
        if record is None:
            try:
                record = node_from_bytes(data)
            except InvalidRequestError as error:
                log.warning("redis %s holds a record of a node that cannot be read: %s", self._name, error.message)
                return None
            if len(self._decoded) >= 1024:
                self._decoded.clear()
            self._decoded[data] = record
        return record

    # ---- calls -----------------------------------------------------------------------------------------------------------

    async def _run(self, shard: int, script: Script, args: Sequence[Any]) -> Any:
        self._check_open()
        return await self._watched(self._link.run(self._layout.prefixes[shard], script, args, self._timeout_s))

    async def _everywhere(self, script: Script, args: Sequence[Sequence[Any]]) -> list[Any]:
        return await _all([self._run(shard, script, one) for shard, one in enumerate(args)])

    async def _watched(self, call: Any) -> Any:
        """Tells the breaker how a call went."""
        try:
            answer = await call
        except DirectoryError as error:
            if has_answered(error):
                self._breaker.succeeded()
            else:
                self._breaker.failed(self._clock.now())
            raise
        self._breaker.succeeded()
        return answer

    def _check_open(self) -> None:
        if self._closed:
            raise DirectoryError("this directory was closed")


def _merged(places: Sequence[Sequence[int]], runs: list[list[_Run]], keys: int) -> list[_Run]:
    """Runs of all keys, of the runs of each shard's."""
    holders: list[tuple[Holder, ...]] = [()] * keys
    for at, shard in zip(places, runs, strict=True):
        spread = chain.from_iterable(repeat(held, count) for held, count in shard)
        for place, held in zip(at, spread, strict=False):  # a shard's runs end where it has no more
            holders[place] = held
    return [(held, 1) for held in takewhile(bool, holders)]


def _holders(words: bytes, records: _Records, known: dict[str, NodeRecord]) -> tuple[Holder, ...]:
    """Those of them that are alive, and whom no shard knows to have been replaced."""
    holders = []
    for number, tier in read_words(words):
        record = records[number]
        if record is not None and record.source.epoch == known[record.source.worker_id].source.epoch:
            holders.append(Holder(record.source.worker_id, record.source.epoch, tier))
    return tuple(holders)


async def _all(calls: Sequence[Any]) -> list[Any]:
    """Results of all calls; the first error once all have ended, so that none is left running."""
    if len(calls) == 1:
        return [await calls[0]]
    results = await asyncio.gather(*calls, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def _epoch(epoch: int) -> str:
    """So that scripts can compare epochs as strings: a number in Lua has 53 bits."""
    return str(epoch).zfill(_EPOCH_DIGITS)
