"""Leases of an inventory: bags of references with a holder and an end. Deciding code; the inventory serialises all calls."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from core.request import AttemptKey


@dataclass(slots=True, eq=False)
class _Lease:
    until: float
    blocks: list[int] = field(default_factory=list)
    ended: bool = False


class Leases:
    """Who holds which blocks until when. References themselves are the inventory's."""

    def __init__(self) -> None:
        self._leases: dict[AttemptKey, _Lease] = {}
        self._ends: list[tuple[float, int, AttemptKey, _Lease]] = []  # heap; a renewed lease is put back when it comes up
        self._pushed = 0

    def __len__(self) -> int:
        return len(self._leases)

    def add(self, holder: AttemptKey, blocks: Iterable[int], until: float) -> None:
        """Adds blocks to the lease of `holder`, opening it if need be; it is never shortened."""
        lease = self._leases.get(holder)
        if lease is None:
            lease = self._leases[holder] = _Lease(until)
            self._push(until, holder, lease)
        lease.blocks += blocks
        lease.until = max(lease.until, until)

    def renew(self, holder: AttemptKey, until: float) -> bool:
        lease = self._leases.get(holder)
        if lease is None:
            return False
        lease.until = max(lease.until, until)
        return True

    def end(self, holder: AttemptKey) -> list[int] | None:
        """The blocks that the lease held, in the order in which they were leased; None when there is no lease."""
        lease = self._leases.pop(holder, None)
        if lease is None:
            return None
        lease.ended = True
        if len(self._ends) > 2 * len(self._leases) + 64:  # ended leases wait in the heap; they must not pile up
            self._ends = [entry for entry in self._ends if not entry[3].ended]
            heapify(self._ends)
        return lease.blocks

    def due(self, now: float) -> list[AttemptKey]:
        """Holders whose time is up (`until <= now`). Their leases are yet to be ended."""
        holders: list[AttemptKey] = []
        while self._ends and self._ends[0][0] <= now:
            _, _, holder, lease = heappop(self._ends)
            if lease.ended:
                continue
            if lease.until > now:
                self._push(lease.until, holder, lease)
                continue
            holders.append(holder)
        return holders

    def of(self, holder: AttemptKey) -> list[int]:
        """What its lease holds, nothing where it has none."""
        lease = self._leases.get(holder)
        return list(lease.blocks) if lease is not None else []

    def held(self) -> dict[AttemptKey, list[int]]:
        """By holder, in the order in which they were leased."""
        return {holder: list(lease.blocks) for holder, lease in self._leases.items()}

    def check(self, refs: list[int]) -> None:
        """Asserts that leases hold no more references than there are, and that each will expire."""
        leased = [0] * len(refs)
        for lease in self._leases.values():
            assert not lease.ended, "an ended lease is still listed"
            for block in lease.blocks:
                leased[block] += 1
        assert all(n <= held for n, held in zip(leased, refs, strict=True)), "a lease holds more than there is"
        listed = [id(entry[3]) for entry in self._ends if not entry[3].ended]
        assert sorted(listed) == sorted(map(id, self._leases.values())), "a lease would never expire"

    def _push(self, until: float, holder: AttemptKey, lease: _Lease) -> None:
        self._pushed += 1  # makes entries distinct, so that a comparison never reaches the lease
        heappush(self._ends, (until, self._pushed, holder, lease))
