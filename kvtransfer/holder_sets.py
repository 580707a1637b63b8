"""Sets of holders as small numbers, shared by all entries with the same holders. Deciding code."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from core.entry_table import NOTHING, Values

Words = tuple[int, ...]
"""node number * 2 + tier, in the order in which they were announced."""


class HolderSets:
    """Number NOTHING is the set of nobody. A set is forgotten, and its number given again, when the last entry leaves it."""

    def __init__(self) -> None:
        self._words: list[Words] = [()]
        self._numbers: dict[Words, int] = {(): NOTHING}
        self._uses = [0]  # of each number: entries; of NOTHING they are not counted
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self._numbers) - 1

    def words(self, number: int) -> Words:
        return self._words[number]

    def changed(self, values: Values, change: Callable[[Words], Words]) -> Values:
        """The numbers of the changed sets of entries, in their order. Counts those entries as moved from one to the other."""
        if not values.size:
            return values
        first = int(values[0])
        if (values == first).all():  # as nearly always
            return np.full(values.size, self._moved(first, values.size, change), np.uint32)
        distinct, which, counts = np.unique(values, return_inverse=True, return_counts=True)
        moved = [self._moved(*pair, change) for pair in zip(distinct.tolist(), counts.tolist(), strict=True)]
        changed: Values = np.array(moved, np.uint32)[which]
        return changed

    def check(self, values: Values) -> None:
        """Asserts that the counts are those of `values`, the numbers of all entries."""
        counts = np.bincount(values, minlength=len(self._words))
        assert counts[1:].tolist() == self._uses[1:], "the entries of a set are miscounted"
        assert len(self) == np.count_nonzero(counts[1:]), "a set without entries"
        assert all(self._words[number] == words for words, number in self._numbers.items()), "a set has two numbers"

    def _moved(self, number: int, count: int, change: Callable[[Words], Words]) -> int:
        """`count` entries leave a set for another, whose number is returned."""
        words = change(self._words[number])
        new = self._numbers.get(words)
        if new is None:
            new = self._new(words)
        self._uses[new] += count
        self._uses[number] -= count
        if not self._uses[number] and number != NOTHING:
            self._forget(number)
        return new

    def _new(self, words: Words) -> int:
        if self._free:
            number = self._free.pop()
            self._words[number] = words
        else:
            number = len(self._words)
            self._words.append(words)
            self._uses.append(0)
        self._numbers[words] = number
        return number

    def _forget(self, number: int) -> None:
        del self._numbers[self._words[number]]
        self._words[number] = ()
        self._free.append(number)
