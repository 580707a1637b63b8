"""A map from block keys to small numbers, thousands of keys at a time: buckets of a cache line, in arrays. Deciding code.

A dict of a million keys costs three cache misses per lookup, one after another; here a key is in one line of memory, nearly
always the first that is looked at, and the misses of a whole prompt overlap. Keys are taken by their first 64 bits, which is
enough for a hint.
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
BUCKET = 8
"""Places of a bucket: a cache line of keys. The last one is filled last; once it is, keys may have gone to the next bucket."""
DROPPED_SHARE = 8  # of a full table an eighth, the oldest, makes room at once
_EMPTY, _DELETED = np.uint64(0), np.uint64(1)
_LOWEST = np.uint64(2)
_BUCKETS_MIN = 256
_FILLED = 0.55  # places in use, above which the table grows
_CLOSED = 0.25  # buckets whose last place was used, above which it is tidied
_INSERT_KEYS = 16_384  # at once, for the sake of memory


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
        self._puts = 0
        self._reset(_BUCKETS_MIN)

    def __len__(self) -> int:
        return self._live

    @property
    def nbytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes + self._stamps.nbytes

    def find(self, keys: Keys) -> Places:
        """Where each key is, −1 where it is not; true until the next `put`."""
        places = np.full(keys.size, -1, dtype=np.int64)
        at = (keys & self._mask).view(np.int64)
        open_ = None
        while at.size:
            lines = self._lines.take(at, axis=0)
            hits = np.flatnonzero(lines == keys[:, None])
            rows = hits >> 3
            found = (at[rows] << 3) | (hits & (BUCKET - 1))
            goes_on = lines[:, BUCKET - 1] != _EMPTY
            goes_on[rows] = False
            if open_ is None:
                places[rows] = found
                open_ = np.flatnonzero(goes_on)
                keys, at = keys[open_], at[open_]
            else:
                places[open_[rows]] = found
                open_, keys, at = open_[goes_on], keys[goes_on], at[goes_on]
            at = (at + 1) & np.int64(self._mask)
        return places

    def at(self, places: Places) -> Values:
        """The values at places that `find` gave."""
        return np.where(places >= 0, self._values.take(places, mode="wrap"), np.uint32(NOTHING))

    def get(self, keys: Keys) -> Values:
        """The value of each key, NOTHING where there is none."""
        return self.at(self.find(keys))

    def put(self, keys: Keys, values: Values, places: Places | None = None) -> None:
        """Sets the values; NOTHING removes. A key that comes twice has the same value twice. `places`: of `find`, just now."""
        if places is None:
            places = self.find(keys)
        known = places >= 0
        self._values[places[known]] = values[known]
        self._remove(np.unique(places[known & (values == NOTHING)]))
        new = np.flatnonzero(~known & (values != NOTHING))
        if new.size:
            self._make_room(new.size)
            self._insert(keys[new], values[new], np.full(new.size, self._puts, dtype=np.uint32))
            self._puts += 1
            if self._live > self._keys_max:
                self._drop_oldest()

    def replace_values(self, changed: Values) -> None:
        """Every value v becomes `changed[v]`; NOTHING removes."""
        live = np.flatnonzero(self._keys > _DELETED)
        self._values[live] = values = changed[self._values[live]]
        self._remove(live[values == NOTHING])

    def values_in_use(self, count: int) -> npt.NDArray[np.bool_]:
        """For each value below `count`, whether a key has it."""
        used = np.zeros(count, dtype=np.bool_)
        used[self._values[self._keys > _DELETED]] = True
        return used

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _reset(self, buckets: int) -> None:
        self._lines = np.zeros((buckets, BUCKET), dtype=np.uint64)
        self._keys = self._lines.reshape(-1)
        self._values = np.zeros(buckets * BUCKET, dtype=np.uint32)
        self._stamps = np.zeros(buckets * BUCKET, dtype=np.uint32)
        self._mask = np.uint64(buckets - 1)
        self._closed = 0
        self._live = 0

    def _remove(self, places: Places) -> None:
        """A key that may have others behind it leaves a mark, so that they are still found."""
        open_ = self._lines[places >> 3, BUCKET - 1] == _EMPTY
        self._keys[places] = np.where(open_, _EMPTY, _DELETED)
        self._live -= places.size

    def _insert(self, keys: Keys, values: Values, stamps: Values) -> None:
        """Of keys that are not in the table, into a table with room."""
        for start in range(0, keys.size, _INSERT_KEYS):
            part = slice(start, start + _INSERT_KEYS)
            self._insert_part(keys[part], values[part], stamps[part])

    def _insert_part(self, keys: Keys, values: Values, stamps: Values) -> None:
        at = (keys & self._mask).view(np.int64)
        left = np.arange(keys.size)
        while left.size:
            lines = self._lines.take(at[left], axis=0)
            fresh = ~(lines == keys[left, None]).any(axis=1)  # it came twice
            left, lines = left[fresh], lines[fresh]
            free = lines <= _DELETED
            first = free.argmax(axis=1)
            room = free[np.arange(left.size), first]
            wanted = left[room]
            places, chosen = np.unique((at[wanted] << 3) | first[room], return_index=True)  # one of several gets a place
            winners = wanted[chosen]
            last = places[(places & (BUCKET - 1)) == BUCKET - 1]
            self._closed += int((self._keys[last] == _EMPTY).sum())
            self._keys[places], self._values[places], self._stamps[places] = keys[winners], values[winners], stamps[winners]
            self._live += winners.size
            at[left[~room]] = (at[left[~room]] + 1) & np.int64(self._mask)
            waiting = np.ones(keys.size, dtype=np.bool_)  # who lost a race looks at the same bucket again
            waiting[winners] = False
            left = left[waiting[left]]

    def _make_room(self, more: int) -> None:
        buckets = len(self._lines)
        size = buckets
        while self._live + more > _FILLED * BUCKET * size:
            size *= 2
        if size > buckets or self._closed > _CLOSED * buckets:
            self._rebuild(size)

    def _drop_oldest(self) -> None:
        live = np.flatnonzero(self._keys > _DELETED)
        too_many = self._live - self._keys_max + self._keys_max // DROPPED_SHARE
        self._remove(live[np.argpartition(self._stamps[live], too_many - 1)[:too_many]])

    def _rebuild(self, buckets: int) -> None:
        live = np.flatnonzero(self._keys > _DELETED)
        keys, values, stamps = self._keys[live], self._values[live], self._stamps[live]
        self._reset(buckets)
        self._insert(keys, values, stamps)
