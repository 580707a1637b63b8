"""Fencing, tombstones, leases of broken sessions."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from core.request import AttemptKey
from worker.attempts import Admitted, AttemptTable, Peer, Refused

R1 = Peer("router-1", 1)
R2 = Peer("router-2", 1)


def key(attempt: int, request: str = "req") -> AttemptKey:
    return AttemptKey(request, attempt)


@pytest.fixture
def table():
    table = AttemptTable(fence_s=60.0)
    yield table
    table.check()


def test_newer_attempt_supersedes_the_older(table):
    assert table.admit(key(1), R1, now=0) == Admitted()
    assert table.admit(key(3), R2, now=1) == Admitted(superseded=key(1))
    assert table.owner(key(1)) is None
    assert table.owner(key(3)) == R2


def test_older_and_repeated_attempts_are_refused(table):
    table.admit(key(2), R1, now=0)
    assert isinstance(table.admit(key(2), R1, now=0), Refused)
    assert isinstance(table.admit(key(1), R1, now=0), Refused)
    table.end(key(2), now=1)
    assert isinstance(table.admit(key(2), R1, now=2), Refused), "an attempt never runs twice"
    assert table.admit(key(3), R1, now=2) == Admitted()


def test_cancel_before_the_command_leaves_a_tombstone(table):
    assert table.cancel(key(2), now=0) is None
    assert isinstance(table.admit(key(1), R1, now=1), Refused)
    assert isinstance(table.admit(key(2), R1, now=1), Refused)
    assert table.admit(key(3), R1, now=1) == Admitted()


def test_cancel_of_an_older_attempt_spares_the_newer(table):
    table.admit(key(2), R1, now=0)
    assert table.cancel(key(1), now=0) is None
    assert table.owner(key(2)) == R1


def test_cancel_of_a_newer_attempt_ends_the_older(table):
    table.admit(key(1), R1, now=0)
    assert table.cancel(key(2), now=0) == key(1)
    assert len(table) == 0


def test_fences_expire_and_are_bounded():
    table = AttemptTable(fence_s=10.0, max_fences=2)
    for name in ("a", "b", "c"):
        table.cancel(key(1, name), now=0)
        table.check()
    assert table.admit(key(1, "a"), R1, now=1) == Admitted(), "the oldest fence made room"
    assert isinstance(table.admit(key(1, "c"), R1, now=9), Refused)
    table.expire(now=10)
    assert table.admit(key(1, "c"), R1, now=10) == Admitted()


def test_a_fence_that_is_raised_again_lasts_longer():
    table = AttemptTable(fence_s=10.0)
    table.cancel(key(2), now=0)
    table.cancel(key(1), now=8)
    assert isinstance(table.admit(key(2), R1, now=15), Refused)


def test_attempts_outlive_a_broken_session_for_its_lease(table):
    table.admit(key(1, "a"), R1, now=0)
    table.admit(key(1, "b"), R2, now=0)
    table.disconnected(R1, lease_s=5, now=10)
    assert table.expire(now=14.9) == []
    assert table.expire(now=15) == [key(1, "a")]
    assert table.live() == (key(1, "b"),)


def test_the_same_router_coming_back_keeps_its_attempts(table):
    table.admit(key(1), R1, now=0)
    table.disconnected(R1, lease_s=5, now=10)
    assert table.connected(R1, now=12) == []
    assert table.expire(now=100) == []
    assert table.owner(key(1)) == R1


def test_a_new_incarnation_of_a_router_ends_what_the_old_one_left(table):
    table.admit(key(1), R1, now=0)
    assert table.connected(Peer("router-1", 2), now=1) == [key(1)]
    assert len(table) == 0


def test_an_attempt_taken_over_by_another_router_is_not_lost_with_the_first(table):
    table.admit(key(1), R1, now=0)
    table.disconnected(R1, lease_s=5, now=1)
    table.admit(key(2), R2, now=2)
    assert table.expire(now=100) == []
    assert table.owner(key(2)) == R2


class TableMachine(RuleBasedStateMachine):
    """Against a plain model: per request the highest attempt that may no longer start, and who runs."""

    requests = st.sampled_from(["a", "b", "c"])
    attempts = st.integers(1, 6)
    peers = st.sampled_from([R1, R2])

    def __init__(self) -> None:
        super().__init__()
        self.table = AttemptTable(fence_s=1e9)
        self.dead: dict[str, int] = {}
        self.live: dict[str, tuple[int, Peer]] = {}

    @rule(request=requests, attempt=attempts, peer=peers)
    def admit(self, request, attempt, peer):
        running = self.live.get(request)
        floor = max(self.dead.get(request, 0), running[0] if running else 0)
        answer = self.table.admit(AttemptKey(request, attempt), peer, 0)
        assert isinstance(answer, Admitted) == (attempt > floor)
        if attempt > floor:
            assert answer.superseded == (AttemptKey(request, running[0]) if running else None)
            if running:
                self.dead[request] = running[0]
            self.live[request] = (attempt, peer)

    @rule(request=requests, attempt=attempts)
    def cancel(self, request, attempt):
        running = self.live.get(request)
        stopped = self.table.cancel(AttemptKey(request, attempt), 0)
        self.dead[request] = max(self.dead.get(request, 0), attempt)
        assert stopped == (AttemptKey(request, running[0]) if running and running[0] <= attempt else None)
        if stopped:
            del self.live[request]

    @rule(request=requests)
    def end(self, request):
        if request in self.live:
            attempt, _ = self.live.pop(request)
            assert self.table.end(AttemptKey(request, attempt), 0)
            self.dead[request] = max(self.dead.get(request, 0), attempt)

    @rule(peer=peers)
    def drop(self, peer):
        ended = self.table.drop(peer, 0)
        assert set(ended) == {AttemptKey(r, a) for r, (a, p) in self.live.items() if p == peer}
        for gone in ended:
            del self.live[gone.request_id]
            self.dead[gone.request_id] = max(self.dead.get(gone.request_id, 0), gone.attempt)

    @invariant()
    def agrees(self):
        self.table.check()
        assert dict(self.table._live) == self.live


TestTableMachine = TableMachine.TestCase
TestTableMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
