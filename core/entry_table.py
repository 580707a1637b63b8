"""A map from keys of 64 bits to small numbers, thousands of keys at a time: linear hashing in arrays. Deciding code.

A dict of a million keys costs several cache misses per key, one after another; here those of a whole prompt overlap. A dict
grows all at once; here (Litwin, "Linear hashing", VLDB 1980) one part after another is split in two, a part at a time, as keys
come, so that nothing takes more than a few milliseconds at any size. Parts lie one after another in two arrays as large as the
table may ever become, which take address space at once and memory as parts come. Within a part: open addressing.

    keys     uint64; 0 is an empty place; a key stays when its value becomes 0, until its part is split or cleared out
    values   uint32; 0 is nothing
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.uint64]
Values = npt.NDArray[np.uint32]
_Places = npt.NDArray[np.int64]
_Flags = npt.NDArray[np.bool_]

NOTHING = 0
_PLACE_BITS = 15
PART_PLACES = 1 << _PLACE_BITS
SHARE = 0.25
"""Of all places that are in use: an entry takes 48 bytes. Parts that wait for their split have twice that share, no more."""
LIVE_SHARE = 0.8
"""Of the places in use: with fewer entries than that, parts are cleared of removed keys instead of split."""
PART_KEYS_MAX = PART_PLACES * 3 // 4
"""Of one part; 16,384 are expected at most. More are refused."""
_EMPTY, _LOWEST = np.uint64(0), np.uint64(1)
_SPREAD = np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing: keys that are alike are not neighbours
_SPREAD_INT, _WORD = int(_SPREAD), (1 << 64) - 1
_PLACE_SHIFT = np.uint64(64 - _PLACE_BITS)
_PART_SHIFT = np.uint64(64 - _PLACE_BITS - 16)


def short_keys(keys: bytes, key_bytes: int) -> Keys:
    """The first 64 bits of each key, as a number that is not the one of an empty place."""
    short: Keys = np.maximum(np.frombuffer(keys, "<u8")[:: key_bytes // 8], _LOWEST)
    return short


def distinct(keys: Keys) -> Keys:
    """Sorted; many times as quick as np.unique."""
    keys = np.sort(keys)
    return keys[np.concatenate((np.ones(1, np.bool_), keys[1:] != keys[:-1]))] if keys.size else keys


class EntryTable:
    """For `keys_max` keys, or as many as there is address space for. The keys of one call are distinct."""

    def __init__(self, keys_max: int) -> None:
        self._parts_max = 1 + int(keys_max / (SHARE * LIVE_SHARE)) // PART_PLACES
        self._keys, self._values = _reserved(self._parts_max)
        self._parts_max = self._keys.size // PART_PLACES
        self._used = np.zeros(self._parts_max, np.int64)  # places of each part that are not empty
        self._parts = 1
        self._level = 1  # the highest power of two that is not above `parts`
        self._next_cleared = 0
        self._used_sum = 0
        self._live = 0

    def __len__(self) -> int:
        return self._live

    @property
    def parts(self) -> int:
        return self._parts

    @property
    def nbytes(self) -> int:
        """Of the parts there are."""
        return self._parts * PART_PLACES * (self._keys.itemsize + self._values.itemsize)

    def get(self, keys: Keys) -> Values:
        """The value of each key, NOTHING where there is none."""
        values: Values = self._values[self._find(keys)[0]]
        return values

    def one(self, key: int) -> int:
        """As `get`, of a single key: a twentieth of the time."""
        spread = key * _SPREAD_INT & _WORD
        part = spread >> int(_PART_SHIFT) & (2 * self._level - 1)
        if part >= self._parts:
            part -= self._level
        first, place = part << _PLACE_BITS, spread >> int(_PLACE_SHIFT)
        while (found := self._keys.item(first + place)) != key:
            if not found:
                return NOTHING
            place = (place + 1) & (PART_PLACES - 1)
        return int(self._values.item(first + place))

    def change(self, keys: Keys, changed: Callable[[Keys, Values], Values]) -> int:
        """Sets the values of `keys` to what `changed` makes of those they have; NOTHING removes.

        New keys of a part that is too full are refused, and `changed` does not hear of them. Returns how many were.
        """
        places, known = self._find(keys)
        refused = self._too_many(places, known)
        if refused.size:
            keys, places, known = np.delete(keys, refused), np.delete(places, refused), np.delete(known, refused)
        old = self._values[places]
        values = changed(keys, old)
        self._live += int(np.count_nonzero(values) - np.count_nonzero(old))
        self._values[places[known]] = values[known]
        new = np.flatnonzero(~known & (values != NOTHING))
        self._insert(keys[new], values[new])
        return refused.size

    def grow(self, more: int, recast: Callable[[Values], Values]) -> None:
        """Makes room for `more` keys. `recast` says what the values of entries that move become; NOTHING drops them."""
        while self._used_sum + more > (limit := self._parts * PART_PLACES * SHARE):
            if self._live + more <= LIVE_SHARE * limit:
                self._next_cleared = (self._next_cleared + 1) % self._parts
                self._rebuild(self._next_cleared, recast)
            elif self._parts < self._parts_max:
                split = self._parts - self._level
                self._parts += 1
                if self._parts == 2 * self._level:
                    self._level = self._parts
                self._rebuild(split, recast)
            else:
                break

    def recast(self, part: int, recast: Callable[[Values], Values]) -> None:
        """Changes the values of all entries of a part; NOTHING drops them."""
        values = self._values[part * PART_PLACES : (part + 1) * PART_PLACES]
        live = np.flatnonzero(values)
        values[live] = new = recast(values[live])
        self._live -= int(live.size - np.count_nonzero(new))

    def values(self) -> Values:
        """Of all entries."""
        values = self._values[: self._parts * PART_PLACES]
        held: Values = values[values != NOTHING]
        return held

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _home(self, keys: Keys) -> _Places:
        """Where each key is best."""
        spread = keys * _SPREAD
        part = (spread >> _PART_SHIFT).astype(np.int64) & (2 * self._level - 1)
        part -= self._level * (part >= self._parts)
        home: _Places = (part << _PLACE_BITS) | (spread >> _PLACE_SHIFT).astype(np.int64)
        return home

    def _find(self, keys: Keys) -> tuple[_Places, _Flags]:
        """Where each key is, or an empty place; and whether it is there."""
        at = self._home(keys)
        found = self._keys[at]
        known = found == keys
        open_ = np.flatnonzero(~known & (found != _EMPTY))
        while open_.size:
            at[open_] = next_ = _after(at[open_])
            found = self._keys[next_]
            hit = found == keys[open_]
            known[open_[hit]] = True
            open_ = open_[~hit & (found != _EMPTY)]
        return at, known

    def _insert(self, keys: Keys, values: Values) -> None:
        """Of keys that are not in it: each takes the first place from its home that has no value."""
        at = self._home(keys)
        left = np.arange(keys.size)
        while left.size:
            free = self._values[at[left]] == NOTHING
            wanted, left = left[free], left[~free]
            places = at[wanted]
            fresh = self._keys[places] == _EMPTY
            self._keys[places] = keys[wanted]
            got = self._keys[places] == keys[wanted]  # of several that want one place, one gets it
            self._values[places[got]] = values[wanted[got]]
            taken = places[got & fresh] >> _PLACE_BITS
            np.add.at(self._used, taken, 1)
            self._used_sum += taken.size
            left = np.concatenate((left, wanted[~got]))
            at[left] = _after(at[left])

    def _too_many(self, places: _Places, known: _Flags) -> _Places:
        """Which keys are new and in a part that cannot take all of its new ones."""
        new = np.flatnonzero(~known)
        part = places[new] >> _PLACE_BITS
        if not (self._used[part] > PART_KEYS_MAX - new.size).any():
            return new[:0]
        full = self._used[: self._parts] + np.bincount(part, minlength=self._parts) > PART_KEYS_MAX
        refused: _Places = new[full[part]]
        return refused

    def _rebuild(self, part: int, recast: Callable[[Values], Values]) -> None:
        """Moves the entries of a part to where they belong now; forgets removed keys."""
        span = slice(part * PART_PLACES, (part + 1) * PART_PLACES)
        self.recast(part, recast)
        live = np.flatnonzero(self._values[span])
        keys, values = self._keys[span][live], self._values[span][live]
        self._used_sum -= int(self._used[part])
        self._keys[span], self._values[span], self._used[part] = _EMPTY, NOTHING, 0
        self._insert(keys, values)


def _reserved(parts: int) -> tuple[Keys, Values]:
    """Address space for so many parts, or half, a quarter … as many where the system has a limit that is lower."""
    while True:
        try:
            return np.zeros(parts * PART_PLACES, np.uint64), np.zeros(parts * PART_PLACES, np.uint32)
        except MemoryError:
            if parts == 1:
                raise
            parts //= 2


def _after(places: _Places) -> _Places:
    """The next place of the same part, around its end."""
    next_: _Places = (places & ~np.int64(PART_PLACES - 1)) | ((places + 1) & np.int64(PART_PLACES - 1))
    return next_
