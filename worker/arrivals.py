"""Prompts on their way into the engine: straight in, or after what others have of their KV was fetched."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from core.blocks import BlockKey, block_keys
from core.clock import Clock
from core.errors import TandemError
from core.inventory import Inventory
from core.request import AttemptKey, WorkItem
from kvtransfer.resident import Resident

log = logging.getLogger(__name__)

INLINE_BLOCKS_MAX = 1024  # keys of longer prompts take milliseconds: not on the event loop
FETCHING_MAX = 256  # prompts that wait for blocks; beyond it they are computed instead


class Arrivals:
    """Used from the asyncio thread only. Without a `resident` every prompt goes straight in."""

    def __init__(
        self,
        resident: Resident | None,
        inventory: Inventory,
        root_key: Callable[[bytes], BlockKey],
        block_size: int,
        timeout_s: float,
        clock: Clock,
    ) -> None:
        self._resident = resident
        self._inventory = inventory
        self._root_key = root_key
        self._block_size = block_size
        self._timeout_s = timeout_s
        self._clock = clock
        self._fetching: dict[AttemptKey, asyncio.Task[None]] = {}

    def __len__(self) -> int:
        """Prompts that wait for blocks."""
        return len(self._fetching)

    def admit(
        self, item: WorkItem, submit: Callable[[WorkItem], None], failed: Callable[[AttemptKey, TandemError], None]
    ) -> None:
        """Calls `submit(item)`, at once when nothing is to be gained elsewhere, else within the time for fetching.

        `submit` gives the item to the engine and may raise TandemError: to the caller when at once, else to `failed`.
        """
        resident = self._resident
        blocks = (len(item.token_ids) - 1) // self._block_size  # one token at least is computed, for its logits
        if resident is None or not resident.may_pay(blocks) or len(self._fetching) >= FETCHING_MAX:
            submit(item)
            return
        keys = self._keys(item, blocks) if blocks <= INLINE_BLOCKS_MAX else None
        if keys is not None and not resident.worth_asking(keys):
            submit(item)
            return
        task = asyncio.create_task(self._fetch(resident, item, blocks, keys, submit, failed), name=f"kv-fetch {item.key}")
        self._fetching[item.key] = task
        task.add_done_callback(lambda done: self._forget(item.key, done))

    def cancel(self, key: AttemptKey) -> None:
        """Idempotent."""
        task = self._fetching.pop(key, None)
        if task is not None:
            task.cancel()

    async def close(self) -> None:
        tasks = list(self._fetching.values())
        for key in list(self._fetching):
            self.cancel(key)
        if tasks:
            await asyncio.wait(tasks)

    def _keys(self, item: WorkItem, blocks: int) -> list[BlockKey]:
        return block_keys(self._root_key(item.cache_salt), item.token_ids[: blocks * self._block_size], self._block_size)

    async def _fetch(
        self,
        resident: Resident,
        item: WorkItem,
        blocks: int,
        keys: Sequence[BlockKey] | None,
        submit: Callable[[WorkItem], None],
        failed: Callable[[AttemptKey, TandemError], None],
    ) -> None:
        started = self._clock.now()
        timeout_s = min(self._timeout_s, item.remaining_s / 2) if item.remaining_s else self._timeout_s
        held: list[int] = []
        try:
            try:
                if keys is None:
                    keys = await asyncio.to_thread(self._keys, item, blocks)
                held = await resident.ensure(keys, item.cache_salt, timeout_s)
            except Exception:  # our own mistake must not cost the request
                log.exception("looking for blocks of %s failed", item.key)
            self._fetching.pop(item.key, None)
            left_s = item.remaining_s and max(0.001, item.remaining_s - (self._clock.now() - started))
            submit(replace(item, remaining_s=left_s))
        except TandemError as error:
            failed(item.key, error)
        finally:
            self._inventory.release(held)  # cached now, and used last of all: the engine finds them in its next step

    def _forget(self, key: AttemptKey, task: asyncio.Task[None]) -> None:
        if self._fetching.get(key) is task:
            del self._fetching[key]
        if not task.cancelled() and (mistake := task.exception()) is not None:
            log.error("taking %s in failed", key, exc_info=mistake)
