"""Tells the directory which processes have ended, so that nobody looks for blocks there until their time to live runs out."""

from __future__ import annotations

import asyncio
import logging

from core.errors import TandemError
from kvtransfer.directory import Directory

log = logging.getLogger(__name__)


class Departures:
    """`gone` returns at once. A directory that is away hears nothing: the time to live of the node ends it there."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._telling: set[asyncio.Task[None]] = set()

    def gone(self, worker_id: str, epoch: int) -> None:
        task = asyncio.create_task(self._tell(worker_id, epoch), name=f"departure of {worker_id}@{epoch}")
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def aclose(self) -> None:
        for task in self._telling:
            task.cancel()
        await asyncio.gather(*self._telling, return_exceptions=True)
        await self._directory.close()

    async def _tell(self, worker_id: str, epoch: int) -> None:
        try:
            await self._directory.leave(worker_id, epoch)
        except TandemError as error:
            log.debug("the directory did not hear that %s@%d is gone: %s", worker_id, epoch, error.message)
