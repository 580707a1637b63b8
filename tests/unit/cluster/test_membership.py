from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.membership import Membership
from core.errors import StaleEpochError
from core.report import WorkerReport, WorkerState
from core.request import WorkerRole

READY, DEAD, DRAINING = WorkerState.READY, WorkerState.DEAD, WorkerState.DRAINING


def report(epoch: int = 1, sequence: int = 1, **facts: object) -> WorkerReport:
    return WorkerReport("decode-0", WorkerRole.DECODE, epoch, sequence, **{"state": READY, **facts})  # type: ignore[arg-type]


@pytest.fixture
def table() -> Membership:
    return Membership(suspect_after_s=1.5, dead_after_s=5.0)


def only(table: Membership, now: float = 0.0) -> WorkerReport:
    (member,) = table.snapshot(now).members
    return member.report


def test_an_expected_worker_is_shown_as_starting_before_it_ever_speaks(table: Membership) -> None:
    table.expect("decode-0", WorkerRole.DECODE, 1, "local", now=0.0)
    assert (only(table).state, only(table).epoch) == (WorkerState.STARTING, 1)


def test_a_heartbeat_that_says_nothing_new_keeps_the_version(table: Membership) -> None:
    table.report(report(sequence=1), now=0.0)
    version = table.version
    assert not table.report(report(sequence=2), now=1.0)
    assert table.version == version
    assert table.snapshot(1.0).members[0].age_s == 0.0
    assert table.report(report(sequence=3, running=4), now=2.0)
    assert table.version == version + 1


def test_an_older_sequence_changes_nothing(table: Membership) -> None:
    table.report(report(sequence=5, running=2), now=0.0)
    assert not table.report(report(sequence=4, running=9), now=1.0)
    assert only(table).running == 2


def test_an_older_epoch_is_refused(table: Membership) -> None:
    table.expect("decode-0", WorkerRole.DECODE, 2, "local", now=0.0)
    with pytest.raises(StaleEpochError, match="superseded by epoch 2"):
        table.report(report(epoch=1, sequence=99), now=1.0)


def test_a_newer_epoch_wins_whatever_its_sequence(table: Membership) -> None:
    table.report(report(epoch=1, sequence=50), now=0.0)
    assert table.report(report(epoch=2, sequence=1), now=0.1)
    assert only(table).epoch == 2


def test_silence_is_suspected_then_fatal_once(table: Membership) -> None:
    table.report(report(), now=0.0)
    assert table.tick(1.4) == []
    assert table.tick(1.5) == []
    assert table.snapshot(1.5).members[0].suspected
    assert [gone for tenth in range(16, 51) for gone in table.tick(tenth / 10)] == [("decode-0", 1)]
    assert only(table).state is DEAD
    assert table.tick(6.0) == []


def test_time_in_which_nobody_judged_is_nobodys_silence(table: Membership) -> None:
    table.tick(0.0)
    table.report(report(), now=0.0)
    assert table.tick(1.0) == []
    assert table.tick(100.0) == [], "the controller was stopped, not the worker"
    assert table.snapshot(100.0).members[0].age_s == 1.0
    assert [gone for tenth in range(1001, 1041) for gone in table.tick(tenth / 10)] == [("decode-0", 1)]


def test_a_suspect_that_speaks_is_trusted_again(table: Membership) -> None:
    table.report(report(sequence=1), now=0.0)
    table.tick(2.0)
    version = table.version
    assert table.report(report(sequence=2), now=2.1), "being trusted again is news"
    assert table.version > version
    assert table.tick(6.9) == []


def test_a_dead_incarnation_cannot_come_back(table: Membership) -> None:
    table.report(report(), now=0.0)
    table.mark_dead("decode-0", 1, "killed by SIGKILL")
    with pytest.raises(StaleEpochError, match="killed by SIGKILL"):
        table.report(report(sequence=2), now=0.1)
    assert only(table).detail == "killed by SIGKILL"


def test_death_of_an_old_incarnation_leaves_its_successor_alone(table: Membership) -> None:
    table.report(report(epoch=2), now=0.0)
    table.mark_dead("decode-0", 1, "late news")
    assert only(table).state is READY


def test_a_starting_worker_may_be_silent(table: Membership) -> None:
    table.report(report(state=WorkerState.STARTING), now=0.0)
    assert table.tick(1000.0) == []


def test_draining_stays_visible_while_the_worker_still_says_ready(table: Membership) -> None:
    table.report(report(sequence=1), now=0.0)
    table.mark_draining("decode-0")
    table.report(report(sequence=2, running=1), now=0.1)
    assert only(table).state is DRAINING
    table.report(report(epoch=2, sequence=1), now=0.2)
    assert only(table).state is READY, "a new incarnation is not draining"


@given(
    st.lists(
        st.tuples(st.integers(1, 3), st.integers(1, 6), st.sampled_from([WorkerState.STARTING, READY]), st.integers(0, 3)),
        max_size=40,
    )
)
def test_the_table_always_holds_the_newest_report_seen(reports: list[tuple[int, int, WorkerState, int]]) -> None:
    table, best, version = Membership(1.5, 5.0), (0, 0), 0
    for epoch, sequence, state, running in reports:
        message = report(epoch, sequence, state=state, running=running)
        before = table.snapshot(0.0).find("decode-0")
        try:
            changed = table.report(message, now=0.0)
        except StaleEpochError:
            assert epoch < best[0]
            changed = False
        after = table.snapshot(0.0).find("decode-0")
        best = max(best, (epoch, sequence))
        assert after is not None
        assert (after.epoch, after.sequence) == best
        assert table.version >= version
        assert changed == (before is None or replace(before, sequence=0) != replace(after, sequence=0))
        assert (table.version > version) == changed
        version = table.version
