"""How long answers will be: learned per group (tenant and class) from those that ended. Deciding code."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import OrderedDict, deque
from typing import NamedTuple

GROUPS_MAX = 10_000
REMEMBERED = 128
UNKNOWN_TOKENS = 128
"""Before a group has ended an answer, and where nobody else has either."""
_EVERYBODY = "\0all"


class Length(NamedTuple):
    """Tokens of an answer: as likely longer as shorter than `median`, longer than `p90` one time in ten."""

    median: int
    p90: int


class Lengths:
    """The latest answers of each group stand for the next one; a group that is new is taken for an average one."""

    def __init__(self) -> None:
        self._groups: OrderedDict[str, _Latest] = OrderedDict()

    def ended(self, group: str, tokens: int) -> None:
        for name in (group, _EVERYBODY):
            self._groups.setdefault(name, _Latest()).add(tokens)
            self._groups.move_to_end(name)
        while len(self._groups) > GROUPS_MAX:
            self._groups.popitem(last=False)

    def predict(self, group: str, tokens_max: int, so_far: int = 0) -> Length:
        """Of an answer that may have `tokens_max` and has `so_far`: those that ended before that say nothing of it."""
        latest = self._groups.get(group) or self._groups.get(_EVERYBODY)
        known = latest.sorted if latest is not None else (UNKNOWN_TOKENS,)
        first = bisect_right(known, so_far)
        longer = len(known) - first
        if not longer:
            return Length(tokens_max, tokens_max)
        p90 = known[first + min(longer - 1, longer * 9 // 10)]
        return Length(min(known[first + longer // 2], tokens_max), min(p90, tokens_max))


class _Latest:
    """Looked at for every placement, so it is kept in order."""

    __slots__ = ("_by_age", "sorted")

    def __init__(self) -> None:
        self._by_age: deque[int] = deque()
        self.sorted: list[int] = []

    def add(self, tokens: int) -> None:
        self._by_age.append(tokens)
        insort(self.sorted, tokens)
        if len(self._by_age) > REMEMBERED:
            gone = self._by_age.popleft()
            del self.sorted[bisect_right(self.sorted, gone) - 1]
