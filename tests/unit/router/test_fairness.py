"""Virtual token counters: whose turn it is, and the bound that the paper proves."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.fairness import IDLE_TENANTS_MAX, INPUT_WEIGHT, OUTPUT_WEIGHT, VirtualCounters


def test_the_least_served_tenant_is_next():
    counters = VirtualCounters()
    for tenant in ("a", "b", "c"):
        counters.arrive(tenant)
    counters.charge_input("a", 10)
    counters.charge_output("b", 4)
    assert counters.order() == ["c", "b", "a"]
    assert (counters.counter("a"), counters.counter("b")) == (10 * INPUT_WEIGHT, 4 * OUTPUT_WEIGHT)


def test_idling_saves_up_nothing():
    counters = VirtualCounters()
    counters.arrive("busy")
    counters.charge_input("busy", 1000)
    counters.arrive("late")
    assert counters.counter("late") == 1000, "lifted to those who wait"


def test_into_an_empty_queue_one_is_lifted_to_whoever_left_it_last():
    counters = VirtualCounters()
    counters.arrive("a")
    counters.charge_input("a", 50)
    counters.leave("a")
    counters.arrive("b")
    assert counters.counter("b") == 50


def test_a_tenant_ahead_of_the_others_is_not_pulled_back():
    counters = VirtualCounters()
    counters.charge_output("a", 100)
    counters.arrive("b")
    counters.arrive("a")
    assert counters.counter("a") == 200


def test_weights_divide_the_charge():
    counters = VirtualCounters({"gold": 4.0})
    counters.charge_input("gold", 100)
    counters.charge_input("plain", 100)
    assert (counters.counter("gold"), counters.counter("plain")) == (25.0, 100.0)


def test_what_others_served_counts_like_our_own():
    counters = VirtualCounters({"a": 2.0})
    counters.arrive("a")
    counters.charge("a", 10)
    counters.charge("b", 7)
    assert counters.snapshot() == {"a": 5, "b": 7}
    assert counters.others("a")
    assert not VirtualCounters().others("a")


def test_more_cannot_leave_than_came():
    with pytest.raises(AssertionError, match="left the queue"):
        VirtualCounters().leave("a")


def test_memory_of_idle_tenants_is_bounded_and_nobody_waiting_is_forgotten():
    counters = VirtualCounters()
    counters.arrive("waits")
    counters.charge_input("waits", 1)
    for number in range(IDLE_TENANTS_MAX + 500):
        counters.charge_input(f"t{number}", 5)
    assert len(counters.snapshot()) <= IDLE_TENANTS_MAX + 1
    assert counters.counter("waits") == 1


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), weights=st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=2, max_size=4))
def test_backlogged_tenants_stay_within_the_bound(seed, weights):
    """A server of `room` running requests, tenants that always have work: service per weight differs by at most 2U."""
    rng = random.Random(seed)
    tenants = {f"t{n}": weight for n, weight in enumerate(weights)}
    counters, served = VirtualCounters(tenants), dict.fromkeys(tenants, 0.0)
    prompt_max, room = 100, 8
    bound = 2 * max(INPUT_WEIGHT * prompt_max, OUTPUT_WEIGHT * room * 20) / min(weights)
    for tenant in tenants:
        counters.arrive(tenant)
    running: list[list] = []
    for _ in range(400):
        while len(running) < room:
            tenant = counters.order()[0]
            prompt = rng.randrange(1, prompt_max + 1)
            counters.charge_input(tenant, prompt)
            served[tenant] += INPUT_WEIGHT * prompt / tenants[tenant]
            running.append([tenant, rng.randrange(1, 21)])
        for job in running:
            counters.charge_output(job[0], 1)
            served[job[0]] += OUTPUT_WEIGHT / tenants[job[0]]
            job[1] -= 1
        running = [job for job in running if job[1]]
        assert max(served.values()) - min(served.values()) <= bound
