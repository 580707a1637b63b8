"""What stays as cache: found by key, evicted, pinned, looked at, told of. One test per promise."""

from __future__ import annotations

import pytest

from core.clock import ManualClock
from core.errors import ConfigError, OutOfBlocksError, PinLimitError
from core.eviction import POLICIES
from core.inventory import BlockCounts, Inventory


def key(n: int) -> bytes:
    return n.to_bytes(16, "big")


def committed(inventory: Inventory, *numbers: int) -> list[int]:
    blocks = inventory.allocate(len(numbers))
    return [inventory.commit(block, key(n)) for block, n in zip(blocks, numbers, strict=True)]


def test_find_takes_what_is_there_and_leaves_gaps() -> None:
    inventory = Inventory(4)
    blocks = committed(inventory, 1, 3)
    inventory.release(blocks)
    assert inventory.find([key(1), key(2), key(3)]) == [blocks[0], None, blocks[1]]
    assert inventory.counts().active == 2
    inventory.release(blocks)
    inventory.check()


def test_evicting_by_name_frees_what_is_cached_and_nothing_else() -> None:
    inventory = Inventory(4)
    blocks = committed(inventory, 1, 2, 3)
    inventory.release(blocks[1:])
    inventory.pin([key(3)])
    before = inventory.generation(blocks[1])
    assert inventory.evict([key(1), key(2), key(3), key(9)]) == 1
    assert inventory.counts() == BlockCounts(total=4, free=2, cached=0, active=2)
    assert inventory.generation(blocks[1]) > before
    assert inventory.match([key(2)]) == []
    assert (inventory.evictions.asked, inventory.evictions.for_space) == (1, 0)
    inventory.check()


def test_pinned_blocks_are_not_evicted_until_they_are_unpinned() -> None:
    inventory = Inventory(4)
    blocks = committed(inventory, 1, 2)
    inventory.release(blocks)
    assert inventory.pin([key(1), key(2), key(9)]) == 2
    assert inventory.pin([key(1)]) == 1
    assert inventory.pinned() == 2
    assert inventory.counts() == BlockCounts(total=4, free=2, cached=0, active=2)
    with pytest.raises(OutOfBlocksError):
        inventory.allocate(3)
    assert inventory.match([key(1)]) == blocks[:1]
    assert inventory.unpin([key(1), key(2), key(1), key(9)]) == 2
    assert inventory.counts() == BlockCounts(total=4, free=2, cached=1, active=1)
    inventory.release(blocks[:1])
    inventory.check()


@pytest.mark.parametrize(("total", "pinned_max", "room"), [(5, None, 2), (5, 1, 1), (5, 0, 0), (6, 4, 4), (4, 4, 4)])
def test_so_many_blocks_can_be_pinned_and_no_more_all_or_none(total: int, pinned_max: int | None, room: int) -> None:
    inventory = Inventory(total, pinned_max=pinned_max)
    numbers = range(1, total + 1)
    inventory.release(committed(inventory, *numbers))
    assert inventory.pinned_max == room
    if room < total:
        with pytest.raises(PinLimitError, match=f"{room + 1} of {total} blocks would be pinned here and {room} may be"):
            inventory.pin([key(n) for n in numbers[: room + 1]])
    assert inventory.pinned() == 0
    fit = [key(n) for n in numbers[:room]]
    assert inventory.pin(fit) == inventory.pin(fit * 2) == room
    assert set(inventory.pinned_keys()) == set(fit)
    assert inventory.counts().cached == total - room
    if room < total:
        with pytest.raises(PinLimitError):
            inventory.pin([key(total)])
    inventory.check()


def test_ages_tell_since_when_a_block_is_here_and_since_when_nobody_uses_it() -> None:
    clock = ManualClock(50.0)
    inventory = Inventory(4, clock=clock.now)
    blocks = committed(inventory, 1, 2)

    def ages() -> list[tuple[float, float]]:
        return [(entry.age_s, entry.idle_s) for entry in inventory.entries()]

    clock.advance(3.0)
    assert ages() == [(3.0, 0.0)] * 2, "held: in use"
    inventory.release(blocks)
    clock.advance(4.0)
    assert ages() == [(7.0, 4.0)] * 2
    inventory.pin([key(2)])
    inventory.look([key(1)])
    clock.advance(1.0)
    assert ages() == [(8.0, 5.0)] * 2, "neither is a use"
    inventory.release(inventory.match([key(1), key(2)]))
    clock.advance(2.0)
    assert ages() == [(10.0, 0.0), (10.0, 2.0)], "the one who looked holds a block that was used meanwhile"
    inventory.release(blocks[:1])
    assert inventory.entries()[0].idle_s == 0.0
    inventory.evict([key(1)])
    assert committed(inventory, 1)
    assert [(entry.key, entry.age_s) for entry in inventory.entries()] == [(key(2), 10.0), (key(1), 0.0)]


def test_a_block_for_this_node_alone_is_found_here_and_told_to_nobody() -> None:
    inventory = Inventory(4)
    inventory.changes(10)
    [mine, theirs] = inventory.allocate(2)
    inventory.commit(mine, key(1), shared=False)
    inventory.commit(theirs, key(2))
    inventory.release([mine, theirs])
    assert inventory.changes(10) == ([key(2)], [], False)
    assert inventory.changes(10, everything=True) == ([key(2)], [], True)
    inventory.release(inventory.match([key(1)]))
    assert inventory.evict([key(1), key(2)]) == 2
    assert inventory.changes(10) == ([], [key(2)], False)
    [again] = committed(inventory, 1)
    assert inventory.changes(10) == ([key(1)], [], False), "committed anew, for all"
    inventory.release([again])
    inventory.check()


def test_an_unpinned_prefix_is_evicted_tail_first() -> None:
    inventory = Inventory(4)
    blocks = committed(inventory, 1, 2)
    inventory.release(blocks)
    inventory.pin([key(1), key(2)])
    inventory.unpin([key(1), key(2)])
    assert [v.block for v in inventory.victims(2)] == [blocks[1], blocks[0]]


def test_victims_are_the_next_to_be_evicted_and_go_back_to_the_front() -> None:
    inventory = Inventory(4)
    blocks = committed(inventory, 1, 2, 3)
    inventory.set_digest(blocks[0], 7)
    for block in blocks:
        inventory.release([block])
    victims = inventory.victims(2)
    assert victims == [(blocks[0], key(1), 7), (blocks[1], key(2), 0)]
    assert inventory.counts() == BlockCounts(total=4, free=1, cached=1, active=2)
    inventory.check()
    inventory.release([v.block for v in victims])
    assert [v.block for v in inventory.victims(9)] == blocks


def test_a_victim_that_was_used_meanwhile_is_none_any_more() -> None:
    inventory = Inventory(3)
    blocks = committed(inventory, 1, 2, 3)
    for block in blocks:
        inventory.release([block])
    victims = [v.block for v in inventory.victims(2)]
    assert inventory.match([key(1)]) == blocks[:1]
    inventory.release(victims)
    inventory.release(blocks[:1])
    assert [v.block for v in inventory.victims(3)] == [blocks[1], blocks[2], blocks[0]]


@pytest.mark.parametrize("policy", POLICIES)
def test_looking_is_no_use_and_leaves_the_order_as_it_is(policy: str) -> None:
    inventory = Inventory(4, policy=policy)
    blocks = committed(inventory, 1, 2, 3, 4)
    for block in blocks:
        inventory.release([block])
    assert inventory.look([key(3), key(9), key(1)]) == [blocks[2], None, blocks[0]]
    assert inventory.counts().cached == 2
    with pytest.raises(OutOfBlocksError):
        inventory.allocate(3)
    assert inventory.allocate(1) == [blocks[1]]  # the next one that nobody looks at
    inventory.release([blocks[0]])
    inventory.release([blocks[2]])
    inventory.check()
    assert [entry.hits for entry in inventory.entries()] == [0, 0, 0]
    assert [v.block for v in inventory.victims(3)] == [blocks[0], blocks[2], blocks[3]]


@pytest.mark.parametrize("use", ["match", "find"])
def test_whoever_uses_a_block_that_another_looks_at_makes_it_young(use: str) -> None:
    inventory = Inventory(2)
    blocks = committed(inventory, 1, 2)
    for block in blocks:
        inventory.release([block])
    inventory.look([key(1)])
    assert getattr(inventory, use)([key(1)]) == blocks[:1]
    inventory.release(blocks[:1])
    inventory.release(blocks[:1])
    assert [v.block for v in inventory.victims(2)] == [blocks[1], blocks[0]]


def test_changes_begin_with_all_that_is_resident_and_go_on_with_the_net_difference() -> None:
    inventory = Inventory(4)
    inventory.release(committed(inventory, 1, 2))
    assert inventory.changes(10) == ([key(1), key(2)], [], True)
    assert inventory.changes(10) == ([], [], False)
    inventory.release(committed(inventory, 3, 4))
    inventory.evict([key(1), key(3)])  # 3 came and went: nobody need hear of it
    inventory.release(committed(inventory, 5))
    assert inventory.changes(2) == ([key(4)], [key(1)], False)
    assert inventory.changes(2) == ([key(5)], [], False)
    assert inventory.changes(9, everything=True) == ([key(2), key(4), key(5)], [], True)


def test_changes_that_nobody_asks_for_do_not_pile_up() -> None:
    inventory = Inventory(4)
    inventory.changes(1)
    inventory.release(committed(inventory, 1, 2, 3, 4))
    inventory.changes(3)
    for first in range(5, 1000, 4):
        inventory.release(committed(inventory, *range(first, first + 4)))
        inventory.check()
    assert inventory.changes(3) == ([], [key(3), key(2), key(1)], False)
    assert inventory.changes(9) == ([key(n) for n in range(997, 1001)], [], False)


def test_entries_tell_of_every_resident_block() -> None:
    inventory = Inventory(4)
    first, second = committed(inventory, 1, 2)
    inventory.release([first])
    inventory.match([key(1)])
    (third,) = inventory.allocate(1)
    inventory.commit(third, key(3), 5, tenant=b"t", cost_s=0.5)
    inventory.pin([key(2)])
    assert inventory.entries() == [
        (key(1), first, 0, b"", 1, 0.0, 1, False, 0.0, 0.0),
        (key(2), second, 0, b"", 0, 0.0, 1, True, 0.0, 0.0),
        (key(3), third, 5, b"t", 0, 0.5, 1, False, 0.0, 0.0),
    ]


def test_evictions_tell_how_long_blocks_had_been_idle() -> None:
    now = 100.0
    inventory = Inventory(2, clock=lambda: now)
    inventory.release(committed(inventory, 1, 2))
    now = 102.0
    inventory.release(inventory.match([key(1)]))
    now = 130.0
    inventory.allocate(2)
    assert inventory.evictions.for_space == 2
    assert inventory.evictions.idle_s.count == 2
    assert inventory.evictions.idle_s.sum == 30.0 + 28.0


def test_a_policy_nobody_knows_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"fifo.*lru, lfu, cost"):
        Inventory(1, policy="fifo")
