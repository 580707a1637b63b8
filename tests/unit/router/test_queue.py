"""Who is next: tables, and the promises that hold whatever happens."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.request import Slo
from router.fairness import INPUT_WEIGHT, VirtualCounters
from router.order import LEVELS, ORDERS, PROMOTE_S, QUANTUM_S, Fcfs, Mlfq, Slack, Waiting
from router.queue import AGED_EVERY, STANDSTILL_S, Pace, WaitQueue


def drain(queue: WaitQueue, now: float = 0.0) -> list[str]:
    order = []
    while (head := queue.head(now)) is not None:
        order.append(head)
        queue.taken(head, now)
    assert len(queue) == 0
    return order


def test_in_order_of_arrival_and_failovers_first():
    queue = WaitQueue(3)
    for name in "abc":
        queue.add(Waiting(name))
    assert queue.full_for("", "")
    queue.add(Waiting("f"), urgent=True)
    queue.add(Waiting("a"), urgent=True)  # waits already: keeps its place
    assert drain(queue) == ["f", "a", "b", "c"]
    assert "a" not in queue


def test_a_higher_class_first_then_the_tenant_served_least():
    counters = VirtualCounters()
    queue = WaitQueue(10, counters=counters)
    counters.charge("rich", 100)
    for name, tenant, priority in (
        ("batch", "poor", -10),
        ("rich-1", "rich", 0),
        ("poor-1", "poor", 0),
        ("chat", "rich", 10),
        ("poor-2", "poor", 0),
    ):
        queue.add(Waiting(name, tenant, priority=priority))
    assert queue.ahead_of("poor", 0) == 4, "the one above, and all three of its own level"
    assert queue.ahead_of("new", 0) == 3
    assert queue.ahead_of("new", 5) == 1
    assert drain(queue) == ["chat", "poor-1", "poor-2", "rich-1", "batch"]


def test_a_tenant_that_is_served_meanwhile_loses_its_turn():
    counters = VirtualCounters()
    queue = WaitQueue(10, counters=counters)
    for name in ("a1", "a2", "b1"):
        queue.add(Waiting(name, name[0]))
    assert queue.head(0.0) == "a1"
    counters.charge_output("a", 5)
    assert drain(queue) == ["b1", "a1", "a2"]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Fcfs, ["slow", "tight", "none", "late"]),
        # `tight` must start by 0.9, `slow` by 4; `none` counts as UNLIMITED_S; `late` has missed its limit already
        (Slack, ["tight", "slow", "none", "late"]),
        # 1 s of prefill goes to a late level, the quick ones to the first, in order of arrival
        (Mlfq, ["tight", "none", "late", "slow"]),
    ],
)
def test_orders(kind, expected):
    order = kind()
    for waiting in (
        Waiting("slow", slo=Slo(ttft_s=5.0), prefill_s=1.0),
        Waiting("tight", slo=Slo(ttft_s=0.9)),
        Waiting("none"),
        Waiting("late", slo=Slo(ttft_s=0.01), prefill_s=QUANTUM_S),
    ):
        order.add(waiting)
    seen = []
    while (first := order.first(0.5)) is not None:
        seen.append(first)
        order.discard(first)
    assert seen == expected
    assert len(order) == 0


def test_a_deadline_counts_with_the_whole_answer():
    assert Waiting("x", arrived_at=1.0, deadline_s=10.0, prefill_s=2.0, decode_s=3.0).start_by == 6.0
    assert Waiting("x", slo=Slo(ttft_s=4.0), deadline_s=10.0, prefill_s=2.0, decode_s=3.0).start_by == 2.0


def test_levels_of_mlfq_double_and_promote():
    order = Mlfq()
    for level in range(LEVELS + 2):
        order.add(Waiting(f"{level}", prefill_s=QUANTUM_S * 2**level, since=1.0))
    assert [len(names) for names in order._levels] == [1] * (LEVELS - 1) + [3]
    order.add(Waiting("new", since=PROMOTE_S))
    assert order.first(PROMOTE_S) == "0"
    order.discard("0")
    assert order.first(PROMOTE_S) == "new"
    order.discard("new")
    assert order.first(1.0 + PROMOTE_S) == "1", "all the others have waited long enough for the first level"
    assert len(order._levels[0]) == LEVELS + 1


def test_the_rest_of_the_queue_is_for_others():
    counters = VirtualCounters()
    queue = WaitQueue(8, counters=counters, shares={"batch": 0.25})
    assert queue.full_for("a", "") == ""
    for number in range(8):
        assert queue.full_for("a", "") == "", "alone, a tenant may fill it all"
        queue.add(Waiting(f"a{number}", "a"))
    assert "router.max_queue is 8" in queue.full_for("a", "")
    for number in range(2, 8):
        queue.remove(f"a{number}")
    counters.charge("b", 1)
    for number in range(2, 4):
        assert queue.full_for("a", "") == ""
        queue.add(Waiting(f"a{number}", "a"))
    assert "4 requests of tenant a" in queue.full_for("a", ""), "as many as it leaves free"
    assert queue.full_for("b", "") == ""
    for number in range(2):
        assert queue.full_for("b", "batch") == ""
        queue.add(Waiting(f"b{number}", "b", "batch"))
    assert "2 requests of class batch" in queue.full_for("b", "batch")
    assert queue.full_for("c", "") == "", "a newcomer still finds room"


def test_one_place_in_four_goes_to_whoever_waits_longest():
    queue = WaitQueue(100, aging_s=10.0)
    queue.add(Waiting("old", priority=-10, since=0.0))
    for number in range(20):
        queue.add(Waiting(f"chat{number}", priority=10, since=5.0))
    now = 9.9
    assert queue.head(now) == "chat0"
    queue.add(Waiting("quick", priority=20, since=now))
    queue.taken("quick", now)
    order = []
    for _ in range(AGED_EVERY):
        now += 0.1
        order.append(queue.head(now))
        queue.taken(order[-1], now)
    assert order == ["chat0", "chat1", "chat2", "old"]


def test_whoever_waits_longest_must_be_served_when_nobody_is():
    queue = WaitQueue(100, aging_s=10.0)
    queue.add(Waiting("old", priority=-10, since=0.0))
    queue.add(Waiting("chat", priority=10, since=5.0))
    assert (queue.head(9.9), queue.turn_of_overdue(9.9)) == ("chat", None), "nobody is overdue"
    assert queue.head(10.0) == queue.turn_of_overdue(10.0) == "old"
    queue.add(Waiting("quick", priority=20, since=10.0))
    queue.taken("quick", 10.0)
    assert (queue.head(10.9), queue.turn_of_overdue(10.9)) == ("chat", None), "it goes on"
    assert queue.turn_of_overdue(10.0 + STANDSTILL_S) == "old"


def test_who_waits_for_a_lull_lets_those_in_time_go_first_whatever_their_tenant_and_class():
    counters = VirtualCounters()
    queue = WaitQueue(10, Slack, counters)
    counters.charge("rich", 100)
    counters.charge("mid", 50)
    for name, tenant, priority, ttft_s in (
        ("long", "poor", 10, 5.0),  # the queue takes it for one that can be in time
        ("late", "mid", 10, 0.1),
        ("quick", "rich", 10, 5.0),
        ("batch", "rich", -10, None),
    ):
        queue.add(Waiting(name, tenant, priority=priority, slo=Slo(ttft_s=ttft_s)))
    now, until = 1.0, 1.05
    assert queue.head(now) == "long", "the tenant that was served least"
    queue.put_off("long", until)
    queue.put_off("not here", until)
    order = []
    for _ in range(4):
        order.append(queue.head(now))
        queue.taken(order[-1], now)
    assert order == ["quick", "batch", "long", "late"], "then the turns of tenants again"


def test_a_lull_is_asked_for_again_at_the_turn_of_who_waits_for_it():
    queue = WaitQueue(10, Slack)
    for name in ("long", "next"):
        queue.add(Waiting(name, name, slo=Slo(ttft_s=5.0)))
    queue.put_off("long", 1.05)
    assert queue.head(1.0) == "next"
    assert queue.head(1.05) == "long"
    queue.put_off("long", 1.1)
    assert queue.head(1.05) == "next"
    queue.add(Waiting("new", "long", slo=Slo(ttft_s=5.0)))
    assert queue.head(1.06) == "new", "its tenant has somebody in time again"


@pytest.mark.parametrize("kind", [Fcfs, Mlfq])
def test_orders_that_know_nothing_of_limits_let_nobody_pass(kind):
    queue = WaitQueue(10, kind)
    for name in ("long", "next"):
        queue.add(Waiting(name, slo=Slo(ttft_s=5.0)))
    queue.put_off("long", 2.0)
    assert queue.head(1.0) == "long"


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(sorted(ORDERS)),
    seed=st.integers(0, 2**32),
    tenants=st.integers(1, 4),
    rate=st.floats(0.5, 3.0),
)
def test_everybody_who_waits_has_a_place_in_bounded_time(kind, seed, tenants, rate):
    """One place a second, more arrivals than that, adversarial priorities: once overdue, a request waits for at most
    AGED_EVERY places for itself and each overdue one that came before it."""
    rng = random.Random(seed)
    counters = VirtualCounters()
    queue = WaitQueue(40, ORDERS[kind], counters, aging_s=12.0)
    since: dict[str, float] = {}
    budget: dict[str, int] = {}  # places that may still go to others
    made = 0
    for now in range(400):
        for _ in range(int(rate) + (rng.random() < rate % 1)):
            tenant = f"t{rng.randrange(tenants)}"
            if queue.full_for(tenant, ""):
                continue
            made += 1
            waiting = Waiting(
                f"r{made}",
                tenant,
                priority=rng.choice([-10, 0, 10]),
                since=now,
                arrived_at=now,
                slo=Slo(ttft_s=rng.choice([None, 0.5, 20.0])),
                prefill_s=rng.random(),
            )
            queue.add(waiting)
            since[waiting.request_id] = now
            assert len(queue) <= queue.bound
        for place, name in enumerate(since):
            if now - since[name] >= 12.0 and name not in budget:
                budget[name] = AGED_EVERY * (place + 1)
        head = queue.head(now)
        if head is None:
            continue
        queue.taken(head, now)
        counters.charge_input(f"t{rng.randrange(tenants)}", rng.randrange(100))
        del since[head]
        budget.pop(head, None)
        for name in budget:
            budget[name] -= 1
            assert budget[name] > 0, f"{name} was passed over too often"
    assert len(queue) == len(since)
    assert set(drain(queue, 400.0)) == set(since)
    assert counters.order() == []


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(sorted(ORDERS)),
    seed=st.integers(0, 2**32),
    weights=st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=2, max_size=4),
)
def test_service_of_waiting_tenants_stays_within_the_bound(kind, seed, weights):
    """The VTC bound (theorem 4.4) through the queue as it is used: arrivals at random, all tenants always waiting."""
    rng = random.Random(seed)
    tenants = {f"t{number}": weight for number, weight in enumerate(weights)}
    counters = VirtualCounters(tenants)
    queue = WaitQueue(10_000, ORDERS[kind], counters)
    prompts, served, made, prompt_max = {}, dict.fromkeys(tenants, 0.0), 0, 100

    def arrive(tenant: str) -> None:
        nonlocal made
        made += 1
        prompts[f"r{made}"] = (tenant, rng.randrange(1, prompt_max + 1))
        queue.add(Waiting(f"r{made}", tenant, since=made, prefill_s=rng.random(), slo=Slo(ttft_s=rng.random())))

    for tenant in tenants:
        arrive(tenant)
    for now in range(600):
        for tenant in tenants:
            while counters.waiting(tenant) < 2 or rng.random() < 0.2:
                arrive(tenant)
        head = queue.head(now)
        assert head is not None
        tenant, tokens = prompts.pop(head)
        queue.taken(head, now)
        counters.charge_input(tenant, tokens)
        served[tenant] += INPUT_WEIGHT * tokens / tenants[tenant]
        assert max(served.values()) - min(served.values()) <= 2 * INPUT_WEIGHT * prompt_max / min(weights)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(sorted(ORDERS)))
def test_any_story_keeps_the_books(seed, kind):
    rng = random.Random(seed)
    counters = VirtualCounters()
    queue = WaitQueue(20, ORDERS[kind], counters, aging_s=3.0)
    names: set[str] = set()
    for now in range(200):
        name = f"r{rng.randrange(30)}"
        act = rng.randrange(5)
        if act < 2:
            queue.add(Waiting(name, f"t{rng.randrange(3)}", since=now, priority=rng.randrange(2)), urgent=rng.random() < 0.1)
            names.add(name)
        elif act == 2:
            queue.remove(name)
            names.discard(name)
        else:
            counters.charge(f"t{rng.randrange(3)}", rng.random())
            head = queue.head(now)
            if head is not None and rng.random() < 0.3:
                queue.put_off(head, now + rng.choice([0.5, 2.0]))
                head = queue.head(now)
            assert (head is None) == (not names)
            assert head is None or head in names
            if head is not None and act == 3:
                queue.taken(head, now)
                names.discard(head)
        assert len(queue) == len(names)
        assert all(name in queue for name in names)
    assert sorted(drain(queue, 300.0)) == sorted(names)
    assert not counters.order()


def test_the_wait_one_is_told_follows_the_pace():
    pace = Pace()
    assert pace.time_for(100) == Pace.RETRY_MIN_S, "nothing is known yet"
    for second in range(200):
        pace.accepted(second * 0.5)
    assert pace.wait_s(20) == pytest.approx(10, rel=0.01)
    assert pace.time_for(0) == Pace.RETRY_MIN_S
    assert pace.time_for(10**6) == Pace.RETRY_MAX_S


def test_a_pause_in_which_nobody_waited_is_no_pace():
    pace = Pace()
    pace.accepted(0.0, others_wait=False)
    pace.accepted(1000.0)
    pace.accepted(1000.5, others_wait=False)
    pace.accepted(5000.0)
    assert pace.wait_s(1) < 0.1
