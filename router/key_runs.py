"""Block keys with small numbers, in the order in which they were learned. Deciding code.

A prompt's blocks are mostly learned together, one after another, so most of its keys lie in a few runs: the first key of a run
is found by hash, the others by comparing what lies behind it, which costs next to nothing. Where runs are short, keys are
looked up hundreds at a time. Keys are taken by their first 64 bits, which is enough for a hint.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from core.blocks import KEY_BYTES, BlockKey
from core.entry_table import NOTHING, EntryTable, Keys, Values
from core.entry_table import short_keys as packed_short_keys

Places = npt.NDArray[np.int64]
"""0 is that of keys that are not here."""

DROPPED_SHARE = 8
"""Of a full table an eighth, the oldest, makes room at once."""
PUT_KEYS = 4096
"""At once, so that those that are moved together make room for them."""
SHORT_RUN, LOOK_KEYS = 64, 512
"""After a run that is shorter so many keys are looked up by hash: as quick as three more such runs."""
_GONE = np.uint64(0)


class PromptKeys(tuple[BlockKey, ...]):
    """Keys of a prompt's blocks, with what they are looked up by: made once, with the keys, for all decisions on the prompt."""

    short: Keys

    def __new__(cls, keys: Iterable[BlockKey]) -> PromptKeys:
        made = super().__new__(cls, keys)
        made.short = packed_keys(b"".join(made))
        return made


def short_keys(keys: Sequence[BlockKey]) -> Keys:
    """The first 8 bytes of each key."""
    return keys.short if isinstance(keys, PromptKeys) else packed_keys(b"".join(keys))


def packed_keys(keys: bytes) -> Keys:
    """As `short_keys`, of keys that lie one after another."""
    return packed_short_keys(keys, KEY_BYTES)


class KeyRuns:
    """At most `keys_max` keys: beyond them those that were put first are dropped, some at a time."""

    def __init__(self, keys_max: int) -> None:
        assert keys_max >= DROPPED_SHARE
        self._keys_max = keys_max
        self._table = EntryTable(keys_max + PUT_KEYS)
        places = keys_max + keys_max // 4 + 2 * PUT_KEYS  # address space; memory is taken as keys come
        self._keys = np.zeros(places, np.uint64)
        self._values = np.zeros(places, np.uint32)
        self._begin = self._end = 1  # all keys are between these

    def __len__(self) -> int:
        return len(self._table)

    @property
    def nbytes(self) -> int:
        """Of memory that was written to."""
        return self._table.nbytes + self._end * (self._keys.itemsize + self._values.itemsize)

    def find(self, keys: Keys) -> Places:
        """Where each key is, until the next `put`."""
        return self._table.get(keys).astype(np.int64)

    def at(self, places: Places) -> Values:
        """The values at places that `find` gave."""
        values: Values = self._values[places]
        return values

    def leading(self, keys: Keys) -> Values:
        """The values of the keys in front of the first one that is not here."""
        runs: list[Values] = []
        start = 0
        while start < keys.size:
            place = self._table.one(keys.item(start))
            if place == NOTHING:
                break
            length = _alike(self._keys[place : place + keys.size - start], keys[start:])
            runs.append(self._values[place : place + length])
            start += length
            if length < SHORT_RUN and start < keys.size:
                places = self.find(keys[start : start + LOOK_KEYS])
                here = _alike(places != NOTHING, np.ones(places.size, np.bool_))
                runs.append(self._values[places[:here]])
                start += here
                if here < places.size:
                    break
        if len(runs) > 1:
            return np.concatenate(runs)
        return runs[0] if runs else np.zeros(0, np.uint32)

    def put(self, keys: Keys, values: Values, places: Places) -> None:
        """Sets the values; NOTHING removes. A key that comes twice has the same value twice. `places`: of `find`, just now."""
        known = places != NOTHING
        self._values[places[known]] = values[known]
        self._remove(keys[known & (values == NOTHING)])
        new = np.flatnonzero(~known & (values != NOTHING))
        if new.size:
            _, first = np.unique(keys[new], return_index=True)
            new = new[np.sort(first)]
            for start in range(0, new.size, PUT_KEYS):
                part = new[start : start + PUT_KEYS]
                self._append(keys[part], values[part])

    def replace_values(self, changed: Values) -> None:
        """Every value v becomes `changed[v]`; NOTHING removes."""
        span = slice(self._begin, self._end)
        after = changed[self._values[span]]
        gone = self._keys[span][(self._values[span] != NOTHING) & (after == NOTHING)]
        self._values[span] = after
        self._remove(gone)

    def values_in_use(self, count: int) -> npt.NDArray[np.bool_]:
        """For each value below `count`, whether a key has it."""
        used = np.zeros(count, dtype=np.bool_)
        used[self._values[self._begin : self._end]] = True
        used[NOTHING] = False
        return used

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _append(self, keys: Keys, values: Values) -> None:
        if self._end + keys.size > self._keys.size:
            self._close_gaps()
        self._table.grow(keys.size, _same)
        self._table.change(keys, lambda taken, _: self._placed(taken))
        here = self.find(keys)  # of a part of the table that is full, new ones are refused
        self._values[here] = values
        self._values[NOTHING] = NOTHING
        if len(self) > self._keys_max:
            self._drop_oldest()

    def _placed(self, keys: Keys) -> Values:
        first, self._end = self._end, self._end + keys.size
        self._keys[first : self._end] = keys
        return np.arange(first, self._end, dtype=np.uint32)

    def _remove(self, keys: Keys) -> None:
        """Their values are NOTHING already."""
        if keys.size:
            keys = np.unique(keys)
            self._keys[self.find(keys)] = _GONE
            self._table.change(keys, lambda _, old: np.zeros_like(old))

    def _drop_oldest(self) -> None:
        too_many = len(self) - self._keys_max + self._keys_max // DROPPED_SHARE
        oldest = self._begin + np.flatnonzero(self._keys[self._begin : self._end])[:too_many]
        self._values[oldest] = NOTHING
        self._remove(self._keys[oldest])
        self._begin = int(oldest[-1]) + 1

    def _close_gaps(self) -> None:
        """Moves all keys to the front, in order."""
        live = np.flatnonzero(self._keys[: self._end])
        moved = np.zeros(self._end, np.uint32)
        moved[live] = np.arange(1, live.size + 1, dtype=np.uint32)
        for part in range(self._table.parts):
            self._table.recast(part, lambda places: moved[places])
        for column in (self._keys, self._values):
            column[1 : live.size + 1] = column[live]
            column[live.size + 1 : self._end] = NOTHING
        self._begin, self._end = 1, live.size + 1


def _alike(some: npt.NDArray[np.generic], others: npt.NDArray[np.generic]) -> int:
    """How many elements are the same before the first that are not."""
    differs = some != others[: some.size]
    first = int(differs.argmax()) if differs.size else 0
    return first if differs.size and differs[first] else differs.size


def _same(values: Values) -> Values:
    return values
