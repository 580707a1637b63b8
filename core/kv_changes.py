"""What a node says of its blocks to those who place requests: numbered portions, all of it first, then what changes.

A portion names net changes since the one before, so a listener that is slow hears less often, not more. Numbers run from 1 in
each stream; whoever misses one asks for a new stream, which begins with nothing. Deciding code.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from core.blocks import KEY_BYTES, BlockKey
from core.errors import InvalidRequestError
from core.inventory import Inventory
from core.inventory_changes import ChangeLog

KEYS_MAX = 4096
"""Of one portion: a message of 64 KiB, which holds up the tokens behind it for a fraction of a millisecond."""


@dataclass(frozen=True, slots=True)
class KvChanges:
    """Keys lie one after another, KEY_BYTES each. What is removed was named before; no key is in both lists of a tier."""

    stream: int
    sequence: int
    added_dram: bytes = b""
    added_disk: bytes = b""
    removed_dram: bytes = b""
    removed_disk: bytes = b""

    def __len__(self) -> int:
        """Keys that it names."""
        return sum(map(len, self._lists())) // KEY_BYTES

    def check(self) -> KvChanges:
        """Itself. Raises InvalidRequestError for what no node of ours sends."""
        if self.sequence < 1 or len(self) > KEYS_MAX or any(len(keys) % KEY_BYTES for keys in self._lists()):
            raise InvalidRequestError(
                f"{len(self)} keys in portion {self.sequence} of a node's blocks; are both the same version?"
            )
        return self

    def _lists(self) -> tuple[bytes, bytes, bytes, bytes]:
        return self.added_dram, self.added_disk, self.removed_dram, self.removed_disk


class ChangeFeed:
    """One stream about one inventory, for one listener. `close` it: until then every commit pays for it."""

    def __init__(self, inventory: Inventory, stream: int = 0) -> None:
        self.stream = stream
        self._inventory = inventory
        self._log = inventory.follow()
        self._disk = ChangeLog()
        self._disk.followed = True
        self._sequence = 0

    def disk(self, came: Iterable[BlockKey], went: Iterable[BlockKey]) -> None:
        """The node's disk, which the inventory knows nothing of. Each key comes and goes in turns."""
        for key in came:
            self._disk.came(key)
        for key in went:
            self._disk.went(key)

    def next(self) -> KvChanges | None:
        """The next portion; None when there is nothing to say. The first one is said even when there is not."""
        dram = self._inventory.changes(KEYS_MAX, log=self._log)
        room = KEYS_MAX - len(dram.added) - len(dram.removed)
        disk = self._disk.take(room, (), everything=False)
        if self._sequence and not (dram.added or dram.removed or disk.added or disk.removed):
            return None
        self._sequence += 1
        lists = map(b"".join, (dram.added, disk.added, dram.removed, disk.removed))
        return KvChanges(self.stream, self._sequence, *lists)

    def close(self) -> None:
        self._inventory.unfollow(self._log)
