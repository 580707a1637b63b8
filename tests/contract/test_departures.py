"""Processes that ended are no holders any more, in whichever directory."""

from __future__ import annotations

import asyncio

from directory_rig import TTL_S, dram, keys, record, shown, until

from cluster.departures import Departures
from kvtransfer.directory import Tier


async def test_nobody_is_looked_for_where_a_process_ended(make):
    one = make()
    for node in (record("a"), record("b"), record("c", epoch=2)):
        await one.join(node, TTL_S)
        await one.announce(node.source.worker_id, node.source.epoch, dram(keys(3)), [])
    departures = Departures(make())
    for ended in (("a", 1), ("b", 1), ("c", 1), ("nobody", 7)):  # c lives on, in a later incarnation
        departures.gone(*ended)
    await until(lambda: nobody_but(one, "c"))
    assert shown(await one.locate(keys(3))) == [{("c", 2, Tier.DRAM)}] * 3
    await departures.aclose()
    departures.gone("c", 2)
    await asyncio.sleep(0)
    await departures.aclose()  # a directory that was closed says so, and nobody minds


async def nobody_but(directory, *names):
    return [node.source.worker_id for node in await directory.nodes()] == list(names)
