"""Transport between processes of one host: one copy out of the other's arena, mapped read-only on first use."""

from __future__ import annotations

import os
from collections.abc import Sequence

from core.blocks import BlockRecord, KvSource
from core.errors import TransferError
from core.request import AttemptKey
from kvtransfer.codec import RAW
from kvtransfer.copier import Copier, Memory
from kvtransfer.shared_arena import MappedArena
from kvtransfer.transport import PullResult

MAPPED_MAX = 256  # incarnations mapped at a time; the one unused longest is unmapped for a new one


class ShmTransport:
    name = "shm"

    def __init__(self, copier: Copier, shm_dir: str) -> None:
        self._copier = copier
        self._shm_dir = shm_dir
        self._mapped: dict[tuple[str, int], MappedArena] = {}  # by (path, epoch), the one used last at the end

    async def pull(
        self, source: KvSource, key: AttemptKey, records: Sequence[BlockRecord], dest_blocks: Sequence[int], codec: str = RAW
    ) -> PullResult:
        arena = await self._arena(source)
        return await self._copier.copy(Memory(arena.blocks, arena.generations), records, dest_blocks)

    def forget(self, source: KvSource) -> None:
        self._mapped.pop((source.arena_path, source.epoch), None)  # a copy under way keeps its own reference

    async def close(self) -> None:
        self._mapped.clear()
        self._copier.close()

    async def _arena(self, source: KvSource) -> MappedArena:
        place = (source.arena_path, source.epoch)
        if not source.arena_path:
            raise TransferError(f"{source.worker_id} has no shared arena; its blocks can be had over grpc")
        arena = self._mapped.pop(place, None)
        if arena is None:  # off the event loop, mapping much memory takes a while; two at once do no harm, the last stays
            self._unmap_removed()
            arena = await self._copier.in_thread(lambda stop: MappedArena(*place, self._shm_dir))
        self._mapped[place] = arena
        while len(self._mapped) > MAPPED_MAX:
            del self._mapped[next(iter(self._mapped))]
        return arena

    def _unmap_removed(self) -> None:
        """A file that was removed keeps its memory for as long as we map it."""
        for place in [place for place in self._mapped if not os.path.exists(place[0])]:
            del self._mapped[place]
