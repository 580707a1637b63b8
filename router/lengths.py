"""How long answers will be: learned per group (tenant and class) from those that ended. Deciding code."""

from __future__ import annotations

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
        self._groups: OrderedDict[str, deque[int]] = OrderedDict()

    def ended(self, group: str, tokens: int) -> None:
        for name in (group, _EVERYBODY):
            self._groups.setdefault(name, deque(maxlen=REMEMBERED)).append(tokens)
            self._groups.move_to_end(name)
        while len(self._groups) > GROUPS_MAX:
            self._groups.popitem(last=False)

    def predict(self, group: str, tokens_max: int, so_far: int = 0) -> Length:
        """Of an answer that may have `tokens_max` and has `so_far`: those that ended before that say nothing of it."""
        known = self._groups.get(group) or self._groups.get(_EVERYBODY) or (UNKNOWN_TOKENS,)
        longer = sorted(min(tokens, tokens_max) for tokens in known if tokens > so_far) or [tokens_max]
        return Length(longer[len(longer) // 2], longer[min(len(longer) - 1, len(longer) * 9 // 10)])
