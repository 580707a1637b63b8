"""What the router believes of the cluster: never an older word for a newer one; ages that grow; claims not yet reported."""

from __future__ import annotations

import random
from types import MappingProxyType

from hypothesis import given
from hypothesis import strategies as st

from core.report import WorkerReport, WorkerState
from core.request import WorkerRole
from router.links import Links
from router.placing import Placer
from router.policies import make_policy
from router.policy import Need, Pair
from router.view import NO_CLAIM, Claim, ClusterView, WorkerView
from router.watch import worker_view

P, D = WorkerRole.PREFILL, WorkerRole.DECODE
READY, DRAINING, DEAD = WorkerState.READY, WorkerState.DRAINING, WorkerState.DEAD


def worker(name: str, role: WorkerRole = P, epoch: int = 1, sequence: int = 1, **fields: object) -> WorkerView:
    made = {"state": READY, "address": "127.0.0.1:1", "blocks_total": 100, "blocks_free": 100, **fields}
    return WorkerView(name, role, epoch, sequence=sequence, **made)  # type: ignore[arg-type]


def view(*workers: WorkerView) -> ClusterView:
    return ClusterView(1, MappingProxyType({one.worker_id: one for one in workers}))


def placer(policy: str = "least_load") -> Placer:
    return Placer(make_policy(policy), 3.0, random.Random(0))


def test_reports_carry_their_numbers():
    report = WorkerReport("p0", P, 3, sequence=17, grpc_address="127.0.0.1:1")
    assert (worker_view(report, 0.5).epoch, worker_view(report, 0.5).sequence) == (3, 17)


def test_an_older_report_of_a_connected_worker_is_not_believed():
    """A controller that starts anew may hear of a worker from somebody else's memory before it hears from the worker."""
    old = view(worker("p0", epoch=2, sequence=9, waiting_tokens=500)).keeping(ClusterView(), frozenset(), 10.0)
    late = view(worker("p0", epoch=2, sequence=8)).keeping(old, frozenset({"p0"}), 11.5)
    assert (late.workers["p0"].sequence, late.workers["p0"].age_s) == (9, 1.5)
    earlier_life = view(worker("p0", epoch=1, sequence=99, state=DEAD)).keeping(old, frozenset({"p0"}), 11.0)
    assert earlier_life.workers["p0"].epoch == 2
    gone = view(worker("p0", epoch=2, sequence=9, state=DEAD)).keeping(old, frozenset({"p0"}), 11.0)
    assert gone.workers["p0"].state is DEAD, "the controller's own word counts"
    drained = view(worker("p0", epoch=2, sequence=8, state=DRAINING)).keeping(old, frozenset({"p0"}), 11.0)
    assert drained.workers["p0"].state is DRAINING
    assert view(worker("p0", epoch=1)).keeping(old, frozenset(), 11.0).workers["p0"].epoch == 1, "nobody is connected to it"


snapshots = st.lists(
    st.builds(
        worker,
        st.sampled_from(["p0", "p1"]),
        epoch=st.integers(1, 3),
        sequence=st.integers(1, 5),
        state=st.sampled_from([READY, DRAINING, DEAD]),
    ),
    max_size=2,
)


@given(st.lists(snapshots, max_size=12))
def test_whatever_comes_a_connected_worker_never_goes_back(seen: list[list[WorkerView]]):
    known, now = ClusterView(), 0.0
    connected = frozenset({"p0", "p1"})
    for workers in seen:
        now += 1.0
        before, known = known, view(*workers).keeping(known, connected, now)
        for name, was in before.workers.items():
            is_now = known.workers[name]
            assert is_now.epoch >= was.epoch
            if is_now.epoch == was.epoch and is_now.state is READY:
                assert is_now.sequence >= was.sequence
            assert is_now.age_s in (0.0, was.age_s + 1.0)


def test_a_report_becomes_stale_while_no_snapshot_comes():
    """The controller is gone: its last word that p1 is idle counts for less and less."""
    reported = view(
        worker("p0", waiting_tokens=100), worker("p1", age_s=1.0), worker("p2", waiting_tokens=300), worker("d0", D)
    )
    seen = reported.keeping(ClusterView(), frozenset(), 50.0)
    connected, here = frozenset(seen.workers), placer()
    assert here.situation(seen, connected, 51.0).prefill.waiting_tokens.tolist() == [100, 0, 300]
    mean = 400 / 3
    assert here.situation(seen, connected, 52.5).prefill.waiting_tokens.tolist() == [100, mean, 300]
    assert here.situation(seen, connected, 54.0).prefill.waiting_tokens.tolist() == [mean, mean, 300]
    settled = here.situation(seen, connected, 54.0)
    assert here.situation(seen, connected, 5000.0) is settled, "nothing can become staler than stale"


def test_what_was_claimed_since_a_worker_reported_stays_beside_its_report():
    """A snapshot about somebody else brings the old report of p0 again: our prompt is not in it."""
    here, connected = placer(), frozenset({"p0", "p1", "d0"})
    others = (worker("p1", waiting_tokens=150), worker("d0", D))
    first = view(worker("p0", waiting_tokens=100), *others).keeping(ClusterView(), frozenset(), 10.0)
    here.situation(first, connected, 10.0)
    here.moved(NO_CLAIM, Claim("p0", 80, "d0"), 10.0)
    assert here.situation(first, connected, 10.1).prefill.waiting_tokens.tolist() == [180, 150]
    again = view(worker("p0", waiting_tokens=100), *others).keeping(first, connected, 10.2)
    assert here.situation(again, connected, 10.2).prefill.waiting_tokens.tolist() == [180, 150]
    newer = view(worker("p0", sequence=2, waiting_tokens=170), *others).keeping(again, connected, 10.7)
    assert here.situation(newer, connected, 10.7).prefill.waiting_tokens.tolist() == [170, 150], "now it is"


@given(
    st.lists(st.sampled_from([READY, DRAINING, DEAD, WorkerState.STARTING]), min_size=4, max_size=4),
    st.sampled_from(["least_load", "goodput", "conductor"]),
)
def test_never_on_a_draining_worker(states: list[WorkerState], policy: str):
    names = ("p0", "p1", "d0", "d1")
    seen = view(*(worker(name, P if name[0] == "p" else D, state=state) for name, state in zip(names, states, strict=True)))
    here = placer(policy)
    place = here._policy.decide(here.situation(seen, frozenset(names), 0.0), Need(100)).place
    if isinstance(place, Pair):
        assert {seen.workers[name].state for name in (place.prefill, place.decode) if name} == {READY}
    else:
        assert READY not in states[:2] or READY not in states[2:]


class _Nobody:
    def link_up(self, worker: str) -> None: ...

    def link_down(self, worker: str, reason: str) -> None: ...

    def heard(self, worker: str, events: object) -> None: ...


async def test_sessions_of_an_older_incarnation_end_before_anybody_can_be_placed_there():
    links = Links("router-0", 1, 5.0, _Nobody())
    try:
        links.follow(view(worker("p0", epoch=1)))
        links._links["p0"].up = True  # its session stands
        assert links.connected() == {"p0"}
        links.follow(view(worker("p0", epoch=2)))
        assert links.connected() == frozenset()
    finally:
        await links.close()
