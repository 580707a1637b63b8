"""What a process keeps of its sources while the directory names nobody for a moment, and lets go when they are gone."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from handoff_pair import EPOCH, Destination, Source, destination_end, source_end
from worker_harness import until

from core.request import AttemptKey

KEY = AttemptKey("request-1", 1)
TOKENS = [7 * n + 1 for n in range(90)]
PATIENCE_S = 1000.0


@pytest.mark.parametrize("transport", ["shm", "grpc"])
async def test_a_directory_that_names_nobody_ends_no_hand_off(transport, tmp_path):
    """As after it restarted empty: everybody has yet to join again."""
    where = str(tmp_path)
    async with (
        source_end(shm_dir=where) as source,
        destination_end(transport=transport, shm_dir=where) as destination,
    ):
        ticket = source.open(KEY)
        source.announce(KEY, TOKENS, 0, 2)
        plan = destination.plan(TOKENS)
        task = asyncio.create_task(destination.puller.pull(ticket, plan))
        await until(lambda: destination.fetcher.stats.blocks[transport] == 2)
        destination.fetcher.keep([], PATIENCE_S)
        source.announce(KEY, TOKENS, 2, 5)
        source.close(KEY, TOKENS)
        await task
        destination.expect(plan, TOKENS)
        destination.expect_all_free(plan)


async def test_memory_of_a_worker_is_let_go_once_it_is_neither_named_nor_used(tmp_path):
    where = str(tmp_path)
    async with source_end(shm_dir=where) as source, destination_end(transport="shm", shm_dir=where) as destination:
        await pulled(source, destination)
        here = source.ticket(KEY).source
        keep = destination.fetcher.keep
        assert mapped(where) == 1
        keep([here], 0.0)
        keep([], PATIENCE_S)
        assert mapped(where) == 1, "it may be back in a moment"
        keep([], 0.0)
        assert mapped(where) == 0


async def test_memory_of_a_worker_that_was_replaced_is_let_go_at_once(tmp_path):
    where = str(tmp_path)
    async with source_end(shm_dir=where) as source, destination_end(transport="shm", shm_dir=where) as destination:
        await pulled(source, destination)
        here = source.ticket(KEY).source
        destination.fetcher.keep([replace(here, epoch=EPOCH - 1)], PATIENCE_S)
        assert mapped(where) == 1
        destination.fetcher.keep([replace(here, epoch=EPOCH + 1)], PATIENCE_S)
        assert mapped(where) == 0


async def pulled(source: Source, destination: Destination) -> None:
    ticket = source.open(KEY)
    source.announce(KEY, TOKENS, 0, 5)
    source.close(KEY, TOKENS)
    plan = destination.plan(TOKENS)
    await destination.puller.pull(ticket, plan)
    destination.inventory.release(plan.blocks)


def mapped(where: str) -> int:
    """How often this process maps an arena to read it; its owner maps it once more, to write."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum(where in line and line.split()[1] == "r--s" for line in lines)
