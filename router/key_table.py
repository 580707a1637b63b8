"""A map from block keys to small numbers, thousands of keys at a time: open addressing in arrays. Deciding code.

A dict of a million keys costs three cache misses per lookup, one after another; here the misses of a whole prompt overlap.
Keys are taken by their first 64 bits, which is enough for a hint.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from core.blocks import KEY_BYTES, BlockKey

Keys = npt.NDArray[np.uint64]
Values = npt.NDArray[np.uint32]
Places = npt.NDArray[np.int64]

NOTHING = 0
"""The value of a key that is not in the table."""
_EMPTY, _DELETED = np.uint64(0), np.uint64(1)
_LOWEST = np.uint64(2)
_SIZE_MIN = 1024
DROPPED_SHARE = 8  # of a full table an eighth, the oldest, makes room at once


def short_keys(keys: Sequence[BlockKey]) -> Keys:
    """The first 8 bytes of each key, as numbers above those the table uses for itself."""
    return packed_keys(b"".join(keys))


def packed_keys(keys: bytes) -> Keys:
    """As `short_keys`, of keys that lie one after another."""
    words: Keys = np.maximum(np.frombuffer(keys, dtype="<u8")[:: KEY_BYTES // 8], _LOWEST)
    return words


class KeyTable:
    """At most `keys_max` keys: beyond them those that were put first are dropped, some at a time."""

    def __init__(self, keys_max: int) -> None:
        assert keys_max >= DROPPED_SHARE
        self._keys_max = keys_max
        self._live = 0
        self._puts = 0
        self._reset(_SIZE_MIN)

    def __len__(self) -> int:
        return self._live

    @property
    def nbytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes + self._stamps.nbytes

    def get(self, keys: Keys) -> Values:
        """The value of each key, NOTHING where there is none."""
        return self.at(self.find(keys))

    def at(self, places: Places) -> Values:
        """The values at places that `find` gave."""
        return np.where(places >= 0, self._values[places], np.uint32(NOTHING))

    def put(self, keys: Keys, values: Values, places: Places | None = None) -> None:
        """Sets the values; NOTHING removes. A key that comes twice has the same value twice. `places`: of `find`, just now."""
        if places is None:
            places = self.find(keys)
        known = places >= 0
        self._values[places[known]] = values[known]
        gone = np.unique(places[known & (values == NOTHING)])
        self._keys[gone] = _DELETED
        self._live -= gone.size
        new = ~known & (values != NOTHING)
        if new.any():
            self._make_room(int(new.sum()))
            self._insert(keys[new], values[new], np.full(int(new.sum()), self._puts, dtype=np.uint32))
            self._puts += 1
            if self._live > self._keys_max:
                self._drop_oldest()

    def replace_values(self, changed: Values) -> None:
        """Every value v becomes `changed[v]`; NOTHING removes."""
        live = self._keys > _DELETED
        self._values[live] = changed[self._values[live]]
        gone = live & (self._values == NOTHING)
        self._keys[gone] = _DELETED
        self._live -= int(gone.sum())

    def values_in_use(self, count: int) -> npt.NDArray[np.bool_]:
        """For each value below `count`, whether a key has it."""
        used = np.zeros(count, dtype=np.bool_)
        used[self._values[self._keys > _DELETED]] = True
        return used

    def find(self, keys: Keys) -> Places:
        """Where each key is, −1 where it is not; true until the next `put`."""
        mask = np.uint64(self._keys.size - 1)
        at = (keys & mask).view(np.int64)
        found = self._keys.take(at)
        same = found == keys
        places = np.where(same, at, np.int64(-1))
        open_ = np.flatnonzero(~same & (found != _EMPTY))
        wanted, at = keys[open_], at[open_]
        while open_.size:
            at = (at + 1) & np.int64(mask)
            found = self._keys.take(at)
            same = found == wanted
            places[open_[same]] = at[same]
            rest = np.flatnonzero(~same & (found != _EMPTY))
            open_, wanted, at = open_[rest], wanted[rest], at[rest]
        return places

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _reset(self, size: int) -> None:
        self._keys = np.zeros(size, dtype=np.uint64)
        self._values = np.zeros(size, dtype=np.uint32)
        self._stamps = np.zeros(size, dtype=np.uint32)
        self._used = 0  # places that are not empty, deleted ones included
        self._live = 0

    def _insert(self, keys: Keys, values: Values, stamps: Values) -> None:
        """Of keys that are not in the table, into a table with room."""
        mask = np.int64(self._keys.size - 1)
        at = (keys & np.uint64(mask)).astype(np.int64)
        left = np.arange(keys.size)
        while left.size:
            found = self._keys[at[left]]
            left = left[found != keys[left]]  # it came twice
            found = self._keys[at[left]]
            free = np.flatnonzero(found <= _DELETED)
            _, first = np.unique(at[left[free]], return_index=True)  # of several that want one place, one gets it
            winners = left[free[first]]
            places = at[winners]
            self._used += int((self._keys[places] == _EMPTY).sum())
            self._keys[places], self._values[places], self._stamps[places] = keys[winners], values[winners], stamps[winners]
            self._live += winners.size
            taken = found > _DELETED
            at[left[taken]] = (at[left[taken]] + 1) & mask
            waiting = np.ones(left.size, dtype=np.bool_)  # who lost a race looks at the same place again
            waiting[free[first]] = False
            left = left[waiting]

    def _make_room(self, more: int) -> None:
        if 2 * (self._used + more) > self._keys.size:
            size = self._keys.size
            while 2 * (self._live + more) > size * 3 // 4:
                size *= 2
            self._rebuild(self._keys > _DELETED, size)

    def _drop_oldest(self) -> None:
        live = self._keys > _DELETED
        too_many = self._live - self._keys_max + self._keys_max // DROPPED_SHARE
        stamps = self._stamps[live]
        oldest = np.partition(stamps, too_many - 1)[too_many - 1]
        kept = live & (self._stamps > oldest)
        surplus = int(live.sum() - kept.sum()) - too_many  # put together with the last one dropped: some may stay
        same = np.flatnonzero(live & (self._stamps == oldest))
        kept[same[:surplus]] = True
        self._rebuild(kept, self._keys.size)

    def _rebuild(self, kept: npt.NDArray[np.bool_], size: int) -> None:
        keys, values, stamps = self._keys[kept], self._values[kept], self._stamps[kept]
        self._reset(size)
        self._insert(keys, values, stamps)
