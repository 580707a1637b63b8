"""Which attempts may run on this worker: fencing, tombstones and the leases of broken sessions. (P)

An attempt at or below its request's fence is dead. Ending an attempt, superseding it and cancelling one that was never
seen all raise the fence, so a late or repeated message finds it closed. Fences expire and are bounded: they only have to
outlive messages on their way.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from core.request import AttemptKey


class Peer(NamedTuple):
    """One incarnation of a router."""

    peer_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Admitted:
    """The attempt may run; `superseded` must be cancelled first."""

    superseded: AttemptKey | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    reason: str


class _Fence(NamedTuple):
    attempt: int  # this attempt and all before it are dead
    until: float


@dataclass(slots=True)
class AttemptTable:
    """Attempts by request, each owned by the router that placed it. Used from one thread.

    Methods that take something away return what the caller has to stop; the table itself forgets it at once, so whatever
    the attempt still emits finds no owner and is dropped.
    """

    fence_s: float = 60.0
    max_fences: int = 65_536
    _live: dict[str, tuple[int, Peer]] = field(default_factory=dict)
    _owned: dict[Peer, set[AttemptKey]] = field(default_factory=dict)
    _fences: OrderedDict[str, _Fence] = field(default_factory=OrderedDict)
    _orphaned_until: dict[Peer, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._live)

    def admit(self, key: AttemptKey, owner: Peer, now: float) -> Admitted | Refused:
        """Lets an attempt in unless it is dead, runs already, or a newer one of its request does."""
        live = self._live.get(key.request_id)
        if live is not None and live[0] >= key.attempt:
            return Refused("the attempt runs here already" if live[0] == key.attempt else f"superseded by attempt {live[0]}")
        fence = self._fences.get(key.request_id)
        if fence is not None and fence.until > now and fence.attempt >= key.attempt:
            return Refused(f"attempts up to {fence.attempt} have ended or were cancelled")
        old = None if live is None else AttemptKey(key.request_id, live[0])
        if old is not None:
            self.end(old, now)
        self._live[key.request_id] = (key.attempt, owner)
        self._owned.setdefault(owner, set()).add(key)
        return Admitted(old)

    def cancel(self, key: AttemptKey, now: float) -> AttemptKey | None:
        """Closes `key` and every earlier attempt of its request, seen or not; returns the one that was running."""
        self._raise_fence(key, now)
        live = self._live.get(key.request_id)
        if live is None or live[0] > key.attempt:
            return None
        running = AttemptKey(key.request_id, live[0])
        self.end(running, now)
        return running

    def end(self, key: AttemptKey, now: float) -> bool:
        """Forgets a live attempt and fences it; False when it is not live."""
        owner = self.owner(key)
        if owner is None:
            return False
        del self._live[key.request_id]
        self._owned[owner].discard(key)
        if not self._owned[owner]:
            del self._owned[owner]
            self._orphaned_until.pop(owner, None)
        self._raise_fence(key, now)
        return True

    def owner(self, key: AttemptKey) -> Peer | None:
        """Who hears of this attempt; None when it is not (or no longer) live."""
        live = self._live.get(key.request_id)
        return live[1] if live is not None and live[0] == key.attempt else None

    def owned_by(self, owner: Peer) -> tuple[AttemptKey, ...]:
        return tuple(self._owned.get(owner, ()))

    def live(self) -> tuple[AttemptKey, ...]:
        return tuple(AttemptKey(request_id, attempt) for request_id, (attempt, _) in self._live.items())

    def connected(self, peer: Peer, now: float) -> list[AttemptKey]:
        """The peer's session stands (again): its attempts are kept. Those of its earlier incarnations end here."""
        self._orphaned_until.pop(peer, None)
        gone = [other for other in self._owned if other.peer_id == peer.peer_id and other.epoch < peer.epoch]
        return self._end_all(gone, now)

    def disconnected(self, peer: Peer, lease_s: float, now: float) -> None:
        """The peer's session broke: its attempts run for another `lease_s`."""
        if peer in self._owned:
            self._orphaned_until[peer] = now + lease_s

    def drop(self, peer: Peer, now: float) -> list[AttemptKey]:
        """Ends everything of a peer at once."""
        return self._end_all([peer], now)

    def expire(self, now: float) -> list[AttemptKey]:
        """Ends the attempts whose router stayed away for its lease, and forgets fences that are old enough."""
        while self._fences and next(iter(self._fences.values())).until <= now:
            self._fences.popitem(last=False)
        return self._end_all([peer for peer, until in self._orphaned_until.items() if until <= now], now)

    def check(self) -> None:
        """Asserts that the two indexes agree and the bound holds."""
        owned = {key: owner for owner, keys in self._owned.items() for key in keys}
        assert owned == {AttemptKey(r, a): owner for r, (a, owner) in self._live.items()}
        assert all(self._owned.values()), "a peer without attempts is not remembered"
        assert self._orphaned_until.keys() <= self._owned.keys()
        assert len(self._fences) <= self.max_fences

    def _end_all(self, peers: Iterable[Peer], now: float) -> list[AttemptKey]:
        ended = []
        for peer in list(peers):
            for key in self.owned_by(peer):
                self.end(key, now)
                ended.append(key)
        return ended

    def _raise_fence(self, key: AttemptKey, now: float) -> None:
        old = self._fences.get(key.request_id)
        attempt = key.attempt if old is None else max(old.attempt, key.attempt)
        self._fences[key.request_id] = _Fence(attempt, now + self.fence_s)
        self._fences.move_to_end(key.request_id)
        if len(self._fences) > self.max_fences:
            self._fences.popitem(last=False)
