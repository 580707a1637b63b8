"""The table of blocks: one test per promise of its docstrings."""

from __future__ import annotations

import numpy as np
import pytest

from core.errors import OutOfBlocksError
from core.inventory import BlockCounts, Inventory
from core.request import AttemptKey

A, B = AttemptKey("a", 0), AttemptKey("b", 0)


def key(n: int) -> bytes:
    return n.to_bytes(16, "big")


def committed(inventory: Inventory, *numbers: int) -> list[int]:
    blocks = inventory.allocate(len(numbers))
    return [inventory.commit(block, key(n)) for block, n in zip(blocks, numbers, strict=True)]


def test_allocation_is_all_or_nothing() -> None:
    inventory = Inventory(4)
    held = inventory.allocate(3)
    with pytest.raises(OutOfBlocksError, match="2 KV blocks are needed and 1 of 4"):
        inventory.allocate(2)
    assert inventory.counts() == BlockCounts(total=4, free=1, cached=0, active=3)
    inventory.release(held)
    assert sorted(inventory.allocate(4)) == [0, 1, 2, 3]
    inventory.check()


def test_allocating_nothing_takes_nothing() -> None:
    inventory = Inventory(1)
    assert inventory.allocate(0) == []
    assert inventory.counts().free == 1


def test_uncommitted_blocks_become_free_and_committed_ones_stay_as_cache() -> None:
    inventory = Inventory(4)
    blocks = committed(inventory, 1, 2) + inventory.allocate(1)
    inventory.release(blocks)
    assert inventory.counts() == BlockCounts(total=4, free=2, cached=2, active=0)
    assert inventory.match([key(1), key(2)]) == blocks[:2]
    assert inventory.key_of(blocks[0]) == key(1)
    assert inventory.key_of(blocks[2]) is None


def test_match_stops_at_the_first_gap_and_holds_only_what_it_returns() -> None:
    inventory = Inventory(4)
    blocks = committed(inventory, 1, 3)
    inventory.release(blocks)
    assert inventory.match([key(1), key(2), key(3)]) == blocks[:1]
    assert inventory.counts() == BlockCounts(total=4, free=2, cached=1, active=1)


def test_eviction_takes_the_oldest_prefix_and_its_tail_first() -> None:
    inventory = Inventory(4)
    old, young = committed(inventory, 1, 2), committed(inventory, 3, 4)
    inventory.release(old)
    inventory.release(young)
    inventory.allocate(1)
    assert inventory.match([key(1), key(2)]) == old[:1]  # the tail went; being matched makes the rest young
    inventory.release(old[:1])
    inventory.allocate(2)
    assert inventory.match([key(3)]) == []
    assert inventory.match([key(1)]) == old[:1]
    inventory.check()


def test_a_matched_block_is_not_evicted() -> None:
    inventory = Inventory(2)
    inventory.release(committed(inventory, 1, 2))
    assert len(inventory.match([key(1), key(2)])) == 2
    with pytest.raises(OutOfBlocksError):
        inventory.allocate(1)


def test_a_second_block_with_the_same_key_gives_way_to_the_first() -> None:
    inventory = Inventory(4)
    (first,) = committed(inventory, 1)
    (second,) = inventory.allocate(1)
    assert inventory.commit(second, key(1), digest=9) == first
    assert inventory.digest(first) == 0  # equal tokens, but the bytes were another block's
    assert inventory.counts() == BlockCounts(total=4, free=3, cached=0, active=1)
    inventory.release([first])
    assert inventory.counts().active == 1  # the reference of the second owner moved over
    inventory.release([first])
    assert inventory.counts() == BlockCounts(total=4, free=3, cached=1, active=0)
    inventory.check()


def test_a_duplicate_takes_a_cached_block_out_of_the_cache() -> None:
    inventory = Inventory(4)
    (first,) = committed(inventory, 1)
    inventory.release([first])
    (second,) = inventory.allocate(1)
    assert inventory.commit(second, key(1)) == first
    assert inventory.counts() == BlockCounts(total=4, free=3, cached=0, active=1)


def test_committing_again_under_the_same_key_changes_nothing() -> None:
    inventory = Inventory(2)
    (block,) = inventory.allocate(1)
    assert inventory.commit(block, key(1), digest=5) == block
    assert inventory.commit(block, key(1)) == block
    assert inventory.digest(block) == 5
    inventory.release([block])
    inventory.check()


@pytest.mark.parametrize(
    "misuse",
    [
        lambda i, held, free: i.release([free]),
        lambda i, held, free: i.retain([free]),
        lambda i, held, free: i.lease(A, [free], 1.0),
        lambda i, held, free: i.commit(free, key(7)),
        lambda i, held, free: (i.commit(held, key(7)), i.commit(held, key(8))),
        lambda i, held, free: i.commit(held, b"short"),
    ],
)
def test_misuse_is_noticed(misuse) -> None:  # type: ignore[no-untyped-def]
    inventory = Inventory(2)
    (held,) = inventory.allocate(1)
    with pytest.raises(AssertionError):
        misuse(inventory, held, 1 - held)


def test_generations_change_when_freed_and_when_handed_out_but_not_while_cached() -> None:
    inventory = Inventory(1)
    (block,) = inventory.allocate(1)
    first = inventory.generation(block)
    inventory.release([block])
    freed = inventory.generation(block)
    assert freed > first
    assert inventory.allocate(1) == [block]
    second = inventory.generation(block)
    assert second > freed
    inventory.commit(block, key(1))
    inventory.release([block])
    assert inventory.match([key(1)]) == [block]
    inventory.release([block])
    assert inventory.generation(block) == second
    inventory.allocate(1)  # evicts
    assert inventory.generation(block) > second
    assert inventory.key_of(block) is None


def test_generations_go_on_from_shared_words() -> None:
    words = np.full(3, 2**40, dtype=np.uint64)
    inventory = Inventory(3, words)
    (block,) = inventory.allocate(1)
    assert int(words[block]) == inventory.generation(block) == 2**40 + 1
    assert type(inventory.generation(block)) is int
    inventory.check()
    words[block] += np.uint64(1)
    with pytest.raises(AssertionError, match="changed by someone else"):
        inventory.check()


def test_digests_are_forgotten_with_the_block_and_set_only_for_the_block_that_was_read() -> None:
    inventory = Inventory(1)
    (block,) = inventory.allocate(1)
    read = inventory.generation(block)
    assert inventory.set_digest(block, 7, read)
    assert inventory.digest(block) == 7
    inventory.release([block])
    inventory.allocate(1)
    assert inventory.digest(block) == 0
    assert not inventory.set_digest(block, 7, read)
    assert inventory.digest(block) == 0


def test_a_lease_keeps_blocks_until_it_ends() -> None:
    inventory = Inventory(4)
    blocks = committed(inventory, 1, 2)
    inventory.lease(A, blocks, until=10.0)
    inventory.release(blocks)
    assert inventory.counts().active == 2
    assert inventory.leases_open() == 1
    assert inventory.end(A)
    assert not inventory.end(A)
    assert inventory.counts() == BlockCounts(total=4, free=2, cached=2, active=0)
    assert inventory.leases_open() == 0


def test_leases_add_up_and_are_never_shortened() -> None:
    inventory = Inventory(4)
    blocks = inventory.allocate(2)
    inventory.lease(A, blocks[:1], until=10.0)
    inventory.lease(A, blocks[1:], until=5.0)
    inventory.release(blocks)
    assert inventory.expire(9.9) == []
    assert inventory.renew(A, 20.0)
    assert inventory.renew(A, 15.0)
    assert inventory.expire(19.9) == []
    inventory.check()
    assert inventory.expire(20.0) == [A]
    assert inventory.counts().free == 4
    assert not inventory.renew(A, 30.0)


def test_only_what_is_past_its_end_expires() -> None:
    inventory = Inventory(4)
    blocks = inventory.allocate(2)
    inventory.lease(A, blocks[:1], until=1.0)
    inventory.lease(B, blocks[1:], until=2.0)
    assert inventory.expire(1.5) == [A]
    assert inventory.leases_open() == 1
    inventory.release(blocks)
    assert inventory.counts().active == 1


def test_a_holder_may_lease_anew_after_its_end() -> None:
    inventory = Inventory(2)
    (block,) = inventory.allocate(1)
    inventory.lease(A, [block], until=1.0)
    inventory.end(A)
    inventory.lease(A, [block], until=5.0)
    assert inventory.expire(2.0) == []  # the old end is not the new one's
    inventory.check()
    assert inventory.expire(5.0) == [A]


def test_ended_leases_do_not_pile_up() -> None:
    inventory = Inventory(1)
    (block,) = inventory.allocate(1)
    for n in range(1000):
        holder = AttemptKey("r", n)
        inventory.lease(holder, [block], until=1e9)
        inventory.end(holder)
    assert len(inventory._leases._ends) < 100


def test_a_run_of_blocks_is_committed_like_each_of_them():
    one, other = Inventory(8), Inventory(8)
    keys = [bytes([n]) * 16 for n in range(4)]
    for inventory in (one, other):
        inventory.commit(inventory.allocate(1)[0], keys[1])
    blocks, single = one.allocate(4), other.allocate(4)
    assert one.commit_run(blocks, keys, 0, 4), "the second one was resident"
    assert blocks == [other.commit(block, key) for block, key in zip(single, keys, strict=True)]
    assert one.counts() == other.counts()
    assert not one.commit_run(blocks, keys, 0, 4), "again under their own keys: nothing changes"
    with pytest.raises(AssertionError, match="another key"):
        one.commit_run(blocks, keys[1:], 0, 1)
    one.check()
