"""Transport between workers of one process: a copy from the other's arena, which a register names."""

from __future__ import annotations

from collections.abc import Sequence

from core.blocks import BlockRecord, KvSource
from core.errors import StaleEpochError, TransferError
from core.request import AttemptKey
from kvtransfer.arena import Arena
from kvtransfer.codec import RAW
from kvtransfer.copier import Copier, Memory
from kvtransfer.transport import PullResult


class LoopbackHub:
    """Which arenas live in this process, by worker. A worker registers its arena while it serves."""

    def __init__(self) -> None:
        self._arenas: dict[str, tuple[int, Arena]] = {}

    def register(self, worker_id: str, epoch: int, arena: Arena) -> None:
        self._arenas[worker_id] = (epoch, arena)

    def unregister(self, worker_id: str, epoch: int) -> None:
        """Idempotent; leaves a newer incarnation alone."""
        if self._arenas.get(worker_id, (None,))[0] == epoch:
            del self._arenas[worker_id]

    def find(self, source: KvSource) -> Arena:
        """Raises TransferError when the worker is not of this process, StaleEpochError for another incarnation."""
        found = self._arenas.get(source.worker_id)
        if found is None:
            raise TransferError(f"{source.worker_id} is not a worker of this process; loopback cannot reach it")
        epoch, arena = found
        if epoch != source.epoch:
            raise StaleEpochError(f"{source.worker_id} is of epoch {epoch}, the ticket of epoch {source.epoch}")
        return arena


PROCESS_HUB = LoopbackHub()
"""The workers of this process: one register, because a process is what it describes."""


class LoopbackTransport:
    name = "loopback"

    def __init__(self, copier: Copier, hub: LoopbackHub = PROCESS_HUB) -> None:
        self._copier = copier
        self._hub = hub

    async def pull(
        self, source: KvSource, key: AttemptKey, records: Sequence[BlockRecord], dest_blocks: Sequence[int], codec: str = RAW
    ) -> PullResult:
        arena = self._hub.find(source)
        return await self._copier.copy(Memory(arena.bytes_view(), arena.generations), records, dest_blocks)

    def forget(self, source: KvSource) -> None:
        """Nothing is cached."""

    async def close(self) -> None:
        self._copier.close()
