"""What the router believes of all nodes' blocks: what they said of memory and disk, and what its own placements will bring.

Deciding code. All of it is a hint: a policy that finds nothing here predicts more time than it will take, no more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from core.blocks import BlockKey
from core.entry_table import Keys
from core.kv_changes import KvChanges
from router.key_runs import PromptKeys, packed_keys, short_keys
from router.prefix_index import Depths, PrefixIndex, Slots

EXPECTED_S = 10.0
"""How long a placed prompt counts as cached where it was placed; by then its worker has said so, or it will not be."""
EXPECTED_SHARE = 8
"""At most this part of `blocks_max` is expected."""
BLOCKS_MIN = 1024


@dataclass(frozen=True, slots=True)
class Match:
    """How far into the keys of a prompt the blocks of each node reach without a gap."""

    depths: Depths
    """In memory, by slot."""
    best: int
    """The longest anywhere, on a disk too."""


NOTHING_KNOWN = Match(np.zeros(1), 0)


class BlockIndex:
    """`blocks_max`: keys per tier; beyond them those learned first are forgotten. About 60 bytes each."""

    def __init__(self, blocks_max: int) -> None:
        self.slots = Slots()
        blocks_max = max(blocks_max, BLOCKS_MIN)
        self._dram = PrefixIndex(self.slots, blocks_max)
        self._disk = PrefixIndex(self.slots, blocks_max)
        self._expected = PrefixIndex(self.slots, max(blocks_max // EXPECTED_SHARE, BLOCKS_MIN))
        self._until: deque[tuple[float, str, Keys]] = deque()
        self._matched: tuple[object, Match] = (None, NOTHING_KNOWN)

    def __len__(self) -> int:
        return len(self._dram) + len(self._disk)

    @property
    def nbytes(self) -> int:
        return self._dram.nbytes + self._disk.nbytes + self._expected.nbytes

    def heard(self, node: str, changes: KvChanges) -> None:
        """A node said what came and went; the first portion of a stream takes the place of everything before it."""
        self._forget_match()
        if changes.sequence == 1:
            self.forget(node)
        for tier, removed, added in (
            (self._dram, changes.removed_dram, changes.added_dram),
            (self._disk, changes.removed_disk, changes.added_disk),
        ):
            if removed:
                tier.removed(node, packed_keys(removed))
            if added:
                tier.added(node, packed_keys(added))

    def expect(self, node: str, keys: Sequence[BlockKey], now: float) -> None:
        """A node took the prompt with these keys: it will have them before it says so."""
        self._forget_match()
        short = short_keys(keys)
        self._expected.added(node, short)
        self._until.append((now + EXPECTED_S, node, short))

    def forget(self, node: str) -> None:
        """The node is gone, or about to say everything again."""
        self._forget_match()
        if self.slots.drop(node) and self.slots.worth_sweeping():
            for tier in (self._dram, self._disk, self._expected):
                tier.sweep()
            self.slots.swept()

    def expire(self, now: float) -> None:
        """Forgets what was expected for too long."""
        while self._until and self._until[0][0] <= now:
            _, node, keys = self._until.popleft()
            self._expected.removed(node, keys)
            self._forget_match()

    def match(self, keys: Sequence[BlockKey]) -> Match:
        """Asked again for the same sequence, before anything changed, it answers at once."""
        if not keys or not self.slots.alive:  # as long as `places` counts, though nobody is left
            return Match(np.zeros(len(self.slots.names) + 1), 0)
        asked = keys.short if isinstance(keys, PromptKeys) else keys  # to let go of thousands of keys takes as long as to look
        if self._matched[0] is not asked:
            self._matched = (asked, self._match(short_keys(keys)))
        return self._matched[1]

    def places(self, names: Sequence[str]) -> npt.NDArray[np.int64]:
        """Where in `Match.depths` each of these nodes is, until `slots.version` changes."""
        nowhere = len(self.slots.names)
        return np.array([self.slots.of.get(name, nowhere) for name in names], dtype=np.int64)

    def _match(self, short: Keys) -> Match:
        depths = self._dram.depths(short)
        best = int(depths.item(depths.argmax()))  # what is expected cannot be fetched yet
        if len(self._expected):
            depths = np.maximum(depths, self._expected.depths(short))
        if len(self._disk) and best < short.size:
            best = max(best, int(self._disk.depths(short).max()))
        return Match(depths, best)

    def _forget_match(self) -> None:
        self._matched = (None, NOTHING_KNOWN)
