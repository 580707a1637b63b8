"""What came to and went from an inventory since somebody last asked. Deciding code; the inventory serialises all calls."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import NamedTuple

from core.blocks import BlockKey


class Changes(NamedTuple):
    """Keys that became resident and keys that are not any more, each in the order in which that happened.

    `lost`: forget what was announced before. `added` begins to name all that is resident, and the calls after this one
    go on with it.
    """

    added: list[BlockKey]
    removed: list[BlockKey]
    lost: bool


class ChangeLog:
    """Net changes since they were asked for, which bounds them by the number of blocks.

    Additions still to be told are resident. Removals are told before any addition, so those still to be told were
    resident together, when the last addition was told. Nothing is remembered before the first question.
    """

    def __init__(self) -> None:
        self.followed = False  # while not, `came` and `went` need not be called
        self._added: dict[BlockKey, None] = {}
        self._removed: dict[BlockKey, None] = {}

    def __len__(self) -> int:
        return len(self._added) + len(self._removed)

    def came(self, key: BlockKey) -> None:
        if key in self._removed:
            del self._removed[key]
        else:
            self._added[key] = None

    def came_all(self, keys: list[BlockKey]) -> None:
        if self._removed:
            for key in keys:
                self.came(key)
        else:
            self._added.update(dict.fromkeys(keys))

    def went(self, key: BlockKey) -> None:
        if key in self._added:
            del self._added[key]
        else:
            self._removed[key] = None

    def went_all(self, keys: list[BlockKey]) -> None:
        for key in keys:
            self.went(key)

    def take(self, limit: int, resident: Iterable[BlockKey], everything: bool) -> Changes:
        """At most `limit` changes, removals before additions; what is left over comes with the next call."""
        lost = everything or not self.followed
        if lost:
            self.followed = True
            self._added, self._removed = dict.fromkeys(resident), {}
        removed = _first(self._removed, limit)
        return Changes(_first(self._added, limit - len(removed)), removed, lost)


def _first(keys: dict[BlockKey, None], count: int) -> list[BlockKey]:
    taken = list(islice(keys, count))
    if len(taken) == len(keys):
        keys.clear()
    else:
        for key in taken:
            del keys[key]
    return taken
