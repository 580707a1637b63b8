from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cluster.reconcile import Command, Forget, GiveUp, Launch, Phase, Reconciler, RestartPolicy, Stop
from core.request import WorkerRole

P, D, R = WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.ROUTER
POLICY = RestartPolicy(start_timeout_s=60.0, grace_s=10.0)


def up(desired: dict[WorkerRole, int] | None = None) -> Reconciler:
    """A reconciler whose cluster has become ready at time 0."""
    reconciler = Reconciler(desired or {R: 1, P: 1, D: 1}, POLICY)
    for command in reconciler.plan(0.0):
        assert isinstance(command, Launch)
        reconciler.ready(command.worker_id, command.epoch, 0.0)
    assert reconciler.was_ready
    return reconciler


def test_everything_desired_is_launched_at_once() -> None:
    commands = Reconciler({R: 1, P: 2, D: 1}, POLICY).plan(0.0)
    assert commands == [
        Launch("router-0", R, 1),
        Launch("prefill-0", P, 1),
        Launch("prefill-1", P, 1),
        Launch("decode-0", D, 1),
    ]


def test_a_plan_is_not_repeated() -> None:
    reconciler = Reconciler({P: 1}, POLICY)
    reconciler.plan(0.0)
    assert reconciler.plan(1.0) == []


def test_a_dead_worker_is_replaced_at_once_with_a_higher_epoch() -> None:
    reconciler = up()
    reconciler.ended("decode-0", 1, "killed by SIGKILL", False, now=3.0)
    assert reconciler.plan(3.0) == [Launch("decode-0", D, 2)]


def test_news_of_an_older_epoch_is_ignored() -> None:
    reconciler = up()
    reconciler.ended("decode-0", 1, "killed", False, now=1.0)
    reconciler.plan(1.0)
    reconciler.ended("decode-0", 1, "killed, told twice", False, now=1.1)
    reconciler.silent("decode-0", 1, now=1.2)
    reconciler.ready("decode-0", 1, now=1.3)
    assert reconciler.plan(1.4) == []
    assert reconciler.slots["decode-0"].phase is Phase.STARTING


def test_repeated_deaths_wait_exponentially_longer_up_to_the_maximum() -> None:
    reconciler, now, delays = up(), 0.0, []
    for epoch in range(1, 12):
        reconciler.ended("decode-0", epoch, "crashed", False, now)
        wake = reconciler.wake_at()
        assert wake is not None
        assert reconciler.plan(wake - 1e-6) == [] or wake == now
        delays.append(wake - now)
        now = wake
        if reconciler.slots["decode-0"].phase is Phase.WAITING:
            assert reconciler.plan(now) == [Launch("decode-0", D, epoch + 1)]
    assert [round(d, 6) for d in delays] == [0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0, 30.0]


def test_a_long_life_forgives_earlier_deaths() -> None:
    reconciler, now = up(), 0.0
    for epoch in (1, 2, 3):
        reconciler.ended("decode-0", epoch, "crashed", False, now)
        now = reconciler.wake_at() or now
        reconciler.plan(now)
    reconciler.ready("decode-0", 4, now)
    reconciler.ended("decode-0", 4, "killed", False, now + POLICY.stable_s)
    assert reconciler.plan(now + POLICY.stable_s) == [Launch("decode-0", D, 5)]


def test_a_mistake_of_the_operator_gives_up_at_once_and_says_why() -> None:
    reconciler = Reconciler({P: 1}, POLICY)
    reconciler.plan(0.0)
    reconciler.ended("prefill-0", 1, "there is no model at /nowhere", True, now=1.0)
    assert reconciler.plan(1.0) == [GiveUp("prefill-0 could not start: there is no model at /nowhere")]


def test_crashes_before_the_first_ready_give_up_after_some_attempts() -> None:
    reconciler, now, commands = Reconciler({P: 1}, POLICY), 0.0, []
    for epoch in range(1, POLICY.start_attempts + 1):
        assert reconciler.plan(now)[-1] == Launch("prefill-0", P, epoch)
        reconciler.ended("prefill-0", epoch, "Segmentation fault", False, now)
        now = reconciler.wake_at() or now
    commands = reconciler.plan(now)
    assert commands[0] == GiveUp("prefill-0 could not start: Segmentation fault")


@pytest.mark.parametrize("permanent", [True, False])
def test_a_cluster_that_has_served_never_gives_up(permanent: bool) -> None:
    reconciler, now = up(), 0.0
    for epoch in range(1, 20):
        reconciler.ended("decode-0", epoch, "the disk is full", permanent, now)
        now = reconciler.wake_at() or now
        assert reconciler.plan(now) == [Launch("decode-0", D, epoch + 1)]


def test_a_start_that_takes_too_long_is_killed_and_tried_again() -> None:
    reconciler = Reconciler({P: 1}, POLICY)
    reconciler.plan(0.0)
    assert reconciler.plan(59.9) == []
    assert reconciler.wake_at() == 60.0
    assert reconciler.plan(60.0) == [Stop("prefill-0", 1, 0.0, "not ready within 60 s")]
    assert reconciler.plan(61.0) == [], "its successor waits until it is gone"
    reconciler.ended("prefill-0", 1, "killed by SIGKILL", False, 61.0)
    assert reconciler.plan(61.0) == [Launch("prefill-0", P, 2)]


def test_a_silent_worker_is_killed_before_its_successor_starts() -> None:
    reconciler = up()
    reconciler.silent("decode-0", 1, now=9.0)
    assert reconciler.plan(9.0) == [Stop("decode-0", 1, 0.0, "it fell silent")]
    reconciler.ended("decode-0", 1, "killed by SIGKILL", False, 9.1)
    assert reconciler.plan(9.1) == [Launch("decode-0", D, 2)]


def test_a_drained_worker_gets_a_successor_now_and_ends_when_idle() -> None:
    reconciler = up()
    assert reconciler.drain("decode-0", deadline=30.0)
    assert reconciler.plan(1.0) == [Launch("decode-1", D, 1)]
    reconciler.drained("decode-0", 1, now=5.0)
    assert reconciler.plan(5.0) == [Stop("decode-0", 1, 10.0, "drained")]
    reconciler.ended("decode-0", 1, "stopped", False, now=5.1)
    assert reconciler.plan(5.1) == [Forget("decode-0")]
    assert set(reconciler.slots) == {"router-0", "prefill-0", "decode-1"}


def test_a_drain_ends_at_its_deadline_at_the_latest() -> None:
    reconciler = up()
    reconciler.drain("decode-0", deadline=30.0)
    reconciler.plan(1.0)
    assert reconciler.plan(30.0) == [Stop("decode-0", 1, 0.0, "its drain deadline passed")]


def test_only_a_ready_worker_can_be_drained() -> None:
    reconciler = up()
    assert not reconciler.drain("decode-7", 9.0)
    assert reconciler.drain("decode-0", 9.0)
    assert not reconciler.drain("decode-0", 9.0)


def test_scaling_down_ends_the_youngest_and_up_fills_gaps() -> None:
    reconciler = up({P: 1, D: 3})
    reconciler.desired[D] = 1
    assert reconciler.plan(1.0) == [
        Stop("decode-1", 1, 10.0, "no longer wanted"),
        Stop("decode-2", 1, 10.0, "no longer wanted"),
    ]
    reconciler.ended("decode-1", 1, "stopped", False, 2.0)
    reconciler.desired[D] = 2
    assert reconciler.plan(2.0) == [Forget("decode-1"), Launch("decode-1", D, 2)]


C, S = WorkerRole.COLOCATED, WorkerRole.STORE


def test_a_worker_that_changes_its_role_is_neither_doubled_nor_ended() -> None:
    reconciler = up({R: 1, P: 2, D: 1})
    assert reconciler.set_role("prefill-1", D) == ""
    assert reconciler.role_of("prefill-1", 1) is D
    assert reconciler.plan(1.0) == []
    assert reconciler.desired == {R: 1, P: 1, D: 2}
    reconciler.ended("prefill-1", 1, "killed", False, now=2.0)
    assert reconciler.plan(2.0) == [Launch("prefill-1", D, 2)], "its successor plays what it played"


@pytest.mark.parametrize(
    ("desired", "target", "role", "why"),
    [
        ({R: 1, P: 1, D: 1}, "prefill-0", D, "at least one prefill"),
        ({R: 1, P: 1, D: 1}, "decode-0", C, "at least one prefill"),
        ({R: 1, C: 2}, "colocated-1", D, "at least one prefill"),
        ({R: 1, P: 2, D: 1}, "router-0", D, "only prefill, decode and colocated"),
        ({R: 1, P: 2, D: 1, S: 1}, "prefill-0", S, "only prefill, decode and colocated"),
        ({R: 1, P: 2, D: 1}, "prefill-7", D, "not ready"),
    ],
)
def test_a_change_of_role_that_would_leave_nobody_to_serve_is_refused(desired, target, role, why) -> None:
    reconciler = up(dict(desired))
    assert why in reconciler.set_role(target, role)
    assert reconciler.desired == desired
    assert reconciler.plan(1.0) == []


def test_a_worker_that_drains_changes_no_role() -> None:
    reconciler = up({R: 1, P: 2, D: 1})
    assert reconciler.drain("prefill-1", 10.0)
    assert "not ready" in reconciler.set_role("prefill-1", D)


class World(RuleBasedStateMachine):
    """Carries out commands like a driver with an arbitrary world, and checks what must hold whatever happens."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.reconciler = up({R: 1, P: 2, D: 2})
        self.alive = {(name, slot.epoch) for name, slot in self.reconciler.slots.items()}
        self.newest = dict.fromkeys(self.reconciler.slots, 1)

    def carry_out(self, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case Launch(worker_id, _, epoch):
                    assert not any(name == worker_id for name, _ in self.alive), "two incarnations at once"
                    assert epoch > self.newest.get(worker_id, 0), "epochs only grow"
                    self.alive.add((worker_id, epoch))
                    self.newest[worker_id] = epoch
                case Stop(worker_id, epoch):
                    assert (worker_id, epoch) in self.alive
                case Forget(worker_id):
                    assert not any(name == worker_id for name, _ in self.alive)
                case GiveUp(reason):
                    raise AssertionError(reason)

    @rule(pick=st.integers(0, 9), what=st.sampled_from(["ready", "end", "permanent", "silent", "drain", "drained"]))
    def event(self, pick: int, what: str) -> None:
        if not self.alive:
            return
        name, epoch = sorted(self.alive)[pick % len(self.alive)]
        match what:
            case "ready":
                self.reconciler.ready(name, epoch, self.now)
            case "end" | "permanent":
                self.alive.discard((name, epoch))
                self.reconciler.ended(name, epoch, "dead", what == "permanent", self.now)
            case "silent":
                self.reconciler.silent(name, epoch, self.now)
            case "drain":
                self.reconciler.drain(name, self.now + 5.0)
            case "drained":
                self.reconciler.drained(name, epoch, self.now)

    @rule(seconds=st.sampled_from([0.0, 0.3, 1.0, 31.0, 61.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.carry_out(self.reconciler.plan(self.now))

    @rule(role=st.sampled_from([P, D]), count=st.integers(0, 3))
    def scale(self, role: WorkerRole, count: int) -> None:
        self.reconciler.desired[role] = count

    @rule(pick=st.integers(0, 9), role=st.sampled_from([P, D, WorkerRole.COLOCATED]))
    def set_role(self, pick: int, role: WorkerRole) -> None:
        names = sorted(self.reconciler.slots)
        before = sum(self.reconciler.desired.values())
        if names:
            self.reconciler.set_role(names[pick % len(names)], role)
        assert sum(self.reconciler.desired.values()) == before
        assert min(self.reconciler.desired.values()) >= 0

    @invariant()
    def there_is_always_a_way_forward(self) -> None:
        for name, slot in self.reconciler.slots.items():
            if slot.phase is Phase.WAITING:
                assert not any(worker == name for worker, _ in self.alive)
            else:
                assert (name, slot.epoch) in self.alive

    def teardown(self) -> None:
        """Left alone, the cluster reaches what is desired."""
        for _ in range(20):
            self.now += 100.0
            self.carry_out(self.reconciler.plan(self.now))
            for name, epoch in sorted(self.alive):
                slot = self.reconciler.slots[name]
                if slot.phase is Phase.STOPPING:
                    self.alive.discard((name, epoch))
                    self.reconciler.ended(name, epoch, "stopped", False, self.now)
                elif slot.phase is Phase.STARTING:
                    self.reconciler.ready(name, epoch, self.now)
        assert self.reconciler.all_ready
        assert len(self.alive) == sum(self.reconciler.desired.values())


World.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestWorld = World.TestCase
