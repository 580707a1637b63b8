"""Which blocks of other hosts get a copy in this host's store, and which copies are given up again. Deciding code.

A copy pays when the same block is fetched over the network again and again. So a key fetched `hits` times within
`window_s` gets one, and a copy that served fewer than `hits` times in `KEEP_WINDOWS` windows loses it: the gap between
the two keeps a key from coming and going.

Fetches are counted in panes, a quarter of the window each, so "within a window" means within its last three quarters to
all of it; no older fetch counts. Memory is bounded whatever is fetched: a pane counts a limited number of keys, as in
Misra and Gries, "Finding repeated elements" (Science of Computer Programming 2, 1982). A key is never counted more often
than it was fetched, and less often by at most a (limit + 1)-th of all that was fetched in the pane.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from core.blocks import BlockKey

PANES = 4
KEEP_WINDOWS = 5


class Decision(NamedTuple):
    """`make`: fetch these and keep them, a prefix before its tail. `give_up`: these copies are not worth their memory.

    A copy may have become the last one meanwhile: whoever evicts it asks the directory first.
    """

    make: tuple[BlockKey, ...]
    give_up: tuple[BlockKey, ...]


@dataclass(slots=True)
class _Replica:
    review_at: float
    uses: int = 0


class Replication:
    """Counts what is fetched from elsewhere and what copies are used; `hits` = 0 never makes any.

    Times are seconds of one monotonic clock. Keys of one prompt are named in the order of the prompt.
    """

    def __init__(self, hits: int, *, window_s: float = 60.0, keys_max: int = 65_536, replicas_max: int = 65_536) -> None:
        assert min(hits, window_s, replicas_max) >= 0, "counts and lengths are not below zero"
        assert keys_max >= PANES, "a pane counts one key at least"
        self._hits = hits
        self._pane_s = window_s / PANES
        self._keep_s = window_s * KEEP_WINDOWS
        self._pane_keys_max = keys_max // PANES
        self._replicas_max = replicas_max
        self._panes: deque[tuple[int, dict[BlockKey, int]]] = deque()  # (number, fetches by key), oldest first
        self._fetches: dict[BlockKey, int] = {}  # the sum of all panes
        self._hot: dict[BlockKey, None] = {}
        self._replicas: OrderedDict[BlockKey, _Replica] = OrderedDict()  # by when they are looked at again

    def __len__(self) -> int:
        """Copies that are kept."""
        return len(self._replicas)

    @property
    def counted(self) -> int:
        """Keys that are counted, `keys_max` at most."""
        return len(self._fetches)

    def fetched(self, now: float, keys: Iterable[BlockKey]) -> None:
        """Another host had to send these."""
        if not self._hits:
            return
        pane = self._pane(now)
        for key in keys:
            if key in self._replicas:
                continue  # it was on its way
            if key not in pane and len(pane) >= self._pane_keys_max:
                self._make_room(pane)
                continue
            pane[key] = pane.get(key, 0) + 1
            self._count(key, 1)

    def made(self, now: float, keys: Iterable[BlockKey]) -> None:
        """Copies of these are here now. What was asked for and did not come is asked for when it was fetched anew."""
        for key in keys:
            self._replicas[key] = _Replica(now + self._keep_s)
            self._replicas.move_to_end(key)

    def used(self, keys: Iterable[BlockKey]) -> None:
        """These were read here; keys without a copy are passed over."""
        for key in keys:
            replica = self._replicas.get(key)
            if replica is not None:
                replica.uses += 1

    def gone(self, keys: Iterable[BlockKey]) -> None:
        """These are not here any more, for whatever reason."""
        for key in keys:
            self._replicas.pop(key, None)

    def decide(self, now: float) -> Decision:
        """What to do now; each key is named once, and a copy that is given up counts as gone."""
        self._pane(now)
        give_up = self._review(now)
        make = tuple(islice(self._hot, max(0, self._replicas_max - len(self._replicas))))
        for key in make:
            for _, fetches in self._panes:
                fetches.pop(key, None)
            del self._fetches[key], self._hot[key]
        return Decision(make, give_up)

    def _review(self, now: float) -> tuple[BlockKey, ...]:
        give_up: list[BlockKey] = []
        while self._replicas:
            key, replica = next(iter(self._replicas.items()))
            if replica.review_at > now:
                break
            if replica.uses < self._hits:
                give_up.append(key)
                del self._replicas[key]
                continue
            replica.review_at, replica.uses = now + self._keep_s, 0
            self._replicas.move_to_end(key)
        return tuple(give_up)

    def _pane(self, now: float) -> dict[BlockKey, int]:
        """The pane that counts now; what is older than the window is forgotten."""
        number = int(now // self._pane_s)
        while self._panes and self._panes[0][0] <= number - PANES:
            for key, count in self._panes.popleft()[1].items():
                self._count(key, -count)
        if not self._panes or self._panes[-1][0] < number:
            self._panes.append((number, {}))
        return self._panes[-1][1]

    def _make_room(self, pane: dict[BlockKey, int]) -> None:
        for key in list(pane):
            pane[key] -= 1
            if not pane[key]:
                del pane[key]
            self._count(key, -1)

    def _count(self, key: BlockKey, more: int) -> None:
        count = self._fetches.get(key, 0) + more
        if count:
            self._fetches[key] = count
        else:
            del self._fetches[key]
        if count >= self._hits:
            self._hot[key] = None
        else:
            self._hot.pop(key, None)
