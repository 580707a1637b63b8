"""The wall clock, of which the disk tier tells ages, jumps by hours or years: every block is served, no age is below zero."""

from __future__ import annotations

import pytest
from disk_rig import TIGHT, put_all, served, tier

START_S = 1.8e9
YEAR_S = 365 * 24 * 3600.0


class Wall:
    def __init__(self) -> None:
        self.s = START_S

    def now(self) -> float:
        return self.s


@pytest.mark.parametrize("jump_s", [5 * 3600.0, -5 * 3600.0, YEAR_S, -YEAR_S, -START_S])
async def test_blocks_outlive_any_jump(jump_s, tmp_path):
    wall = Wall()
    disk = tier(tmp_path, now_s=wall.now)
    await put_all(disk, range(5))
    wall.s += jump_s
    await put_all(disk, range(5, 9))
    assert await served(disk, range(9)) == list(range(9))
    assert (await disk.verify()).dropped == 0
    await disk.close()
    wall.s -= 2 * jump_s
    disk = tier(tmp_path, now_s=wall.now)
    assert await served(disk, range(9)) == list(range(9)), "after a restart on the other side of it, too"
    assert await disk.evict(disk.keys()[0])
    await disk.close()


@pytest.mark.parametrize("jump_s", [YEAR_S, -YEAR_S])
async def test_what_goes_for_want_of_room_does_so_by_order_and_not_by_age(jump_s, tmp_path):
    wall = Wall()
    disk = tier(tmp_path, TIGHT, now_s=wall.now)
    await put_all(disk, range(40))
    wall.s += jump_s
    await put_all(disk, range(40, 80))
    there = await served(disk, range(80))
    assert there == list(range(80 - len(there), 80)), "the oldest went, whatever the clock said of them"
    ages = disk.stats.dropped_age_s
    assert ages.count == disk.stats.dropped_blocks > 0
    assert ages.sum >= 0
    await disk.close()
