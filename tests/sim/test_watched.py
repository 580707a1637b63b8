"""Rules that are looked at where something was touched find what looking at everything finds."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sim.watched import WatchedInventory

KEYS = [bytes([n]) * 16 for n in range(4)]
HELD, NAMELESS, CACHED, PINNED, FREE = range(5)


def inventory() -> WatchedInventory:
    """A block in each state, and some more that are free."""
    made = WatchedInventory(8, lambda: None)
    blocks = made.allocate(4)
    assert blocks == [HELD, NAMELESS, CACHED, PINNED]
    for block in (HELD, CACHED, PINNED):
        made.commit(block, KEYS[block])
    made.release([CACHED, PINNED])
    return made


def _free(made: WatchedInventory, block: int) -> None:
    if block in made._free:
        made._free.remove(block)
    else:
        made._free.append(block)


def _idle(made: WatchedInventory, block: int) -> None:
    if block in made._idle:
        made._idle.remove(block)
    else:
        made._idle.add(block, 0.0)


def _refs(made: WatchedInventory, block: int) -> None:
    made._refs[block] ^= 1


def _owed(made: WatchedInventory, block: int) -> None:
    made._refs[block] -= 2


def _name(made: WatchedInventory, block: int) -> None:
    made._key[block] = b"?" * 16 if made._key[block] is None else None


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("block", [HELD, NAMELESS, CACHED, PINNED, FREE])
@pytest.mark.parametrize("spoil", [_free, _idle, _refs, _owed, _name])
def test_whatever_is_wrong_with_a_block_that_was_touched_is_found(
    spoil: Callable[[WatchedInventory, int], None], block: int, pinned: bool
):
    made = inventory()
    if pinned:  # then none is in one of the three plain states for sure
        made.pin([KEYS[PINNED]])
    made.check_touched()
    made.check()
    spoil(made, block)
    made.touched.add(block)
    fine = pinned and block == PINNED and spoil is _refs  # a pinned block may be held
    assert _finds(made.check_touched) == _finds(made.check) == (not fine)


def _finds(check: Callable[[], None]) -> bool:
    try:
        check()
    except AssertionError:
        return True
    return False
