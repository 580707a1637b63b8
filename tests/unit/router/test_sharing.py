"""What routers tell each other: every tenant's service is counted once at each of them, whatever gets lost on the way."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from core.config import TenantConfig
from router.quotas import Quotas
from router.sharing import NOTHING, TENANTS_MAX, Service, Sharing


class Table:
    """The totals as Redis keeps them."""

    def __init__(self) -> None:
        self.totals: dict[str, Service] = {}

    def add(self, told: dict[str, Service]) -> list[Service]:
        for tenant, service in told.items():
            self.totals[tenant] = self.totals.get(tenant, NOTHING).plus(service)
        return [self.totals[tenant] for tenant in told]


def sharing() -> Sharing:
    made = Sharing()
    made.on = True
    return made


def exchange(one: Sharing, table: Table, interesting: tuple[str, ...] = ("a", "b")) -> dict[str, Service]:
    told = one.to_tell(interesting)
    return one.heard(told, table.add(told))


def test_others_are_heard_once_and_one_s_own_never():
    table, one, two = Table(), sharing(), sharing()
    assert exchange(one, table) == exchange(two, table) == {}
    one.served("a", 10, 6)
    assert exchange(one, table) == {}
    assert exchange(two, table) == {"a": Service(10, 6)}
    assert exchange(two, table) == {}
    two.served("b", 4, 2)
    one.served("b", 3, 1)
    assert exchange(two, table) == {}
    assert exchange(one, table) == {"b": Service(4, 2)}
    assert exchange(two, table) == {"b": Service(3, 1)}


def test_history_from_before_one_s_own_time_is_not_charged():
    table, old, new = Table(), sharing(), sharing()
    old.served("a", 1e6, 1e6)
    exchange(old, table)
    assert exchange(new, table) == {}
    old.served("a", 5, 5)
    exchange(old, table)
    assert exchange(new, table) == {"a": Service(5, 5)}


def test_totals_that_were_lost_begin_anew():
    table, one, two = Table(), sharing(), sharing()
    for each in (one, two):
        exchange(each, table)
        each.served("a", 100, 100)
        exchange(each, table)
    exchange(one, table)
    table.totals.clear()
    one.served("a", 7, 7)
    assert exchange(one, table) == {}
    assert exchange(two, table) == {}, "a total below what was known is nobody's service"
    one.served("a", 3, 3)
    exchange(one, table)
    assert exchange(two, table) == {"a": Service(3, 3)}


def test_what_was_not_told_is_told_again_and_not_taken_for_others():
    table, one, two = Table(), sharing(), sharing()
    exchange(one, table)
    exchange(two, table)
    one.served("a", 5, 5)
    told = one.to_tell(())
    table.add(told)  # it arrived, but the answer did not
    one.not_told(told)
    one.served("a", 1, 1)
    assert exchange(one, table) == {}
    assert exchange(two, table) == {"a": Service(11, 11)}, "in doubt rather twice than never"


def test_nothing_is_kept_when_nobody_listens_and_memory_is_bounded():
    silent = Sharing()
    silent.served("a", 1, 1)
    assert silent.to_tell(()) == {}
    one, table = sharing(), Table()
    for number in range(TENANTS_MAX + 100):
        one.served(f"t{number}", 1, 1)
    told = one.to_tell(())
    assert len(told) == TENANTS_MAX
    one.heard(told, table.add(told))
    one.not_told(told)
    assert len(one.to_tell(())) == TENANTS_MAX


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), routers=st.integers(2, 4))
def test_after_the_last_exchange_all_routers_know_all_service(seed, routers):
    rng = random.Random(seed)
    table, each = Table(), [sharing() for _ in range(routers)]
    known = [dict.fromkeys("ab", 0.0) for _ in each]
    truth = dict.fromkeys("ab", 0.0)

    def talk(number: int) -> None:
        for tenant, service in exchange(each[number], table).items():
            known[number][tenant] += service.weighted

    for number in range(routers):
        talk(number)
    for _ in range(100):
        number, tenant, weighted = rng.randrange(routers), rng.choice("ab"), float(rng.randrange(1, 50))
        each[number].served(tenant, weighted, 1)
        known[number][tenant] += weighted
        truth[tenant] += weighted
        if rng.random() < 0.3:
            talk(rng.randrange(routers))
    for _ in range(2):
        for number in range(routers):
            talk(number)
    assert all(counted == truth for counted in known)


# ---- quotas: the same tokens, counted down -----------------------------------------------------------------------------


def test_a_quota_is_used_up_overdrawn_and_waited_off():
    quotas = Quotas({"a": TenantConfig(tokens_per_s=10, burst_tokens=100), "free": TenantConfig()})
    assert (quotas.wait_s("a", 5.0), quotas.wait_s("free", 5.0), quotas.wait_s("unknown", 5.0)) == (0, 0, 0)
    quotas.used("a", 150, 5.0)
    assert quotas.wait_s("a", 5.0) == 5.1, "50 tokens of debt and one to begin with"
    assert quotas.wait_s("a", 8.0) == 2.1
    assert quotas.wait_s("a", 10.2) == 0
    quotas.used("free", 10**9, 5.0)
    assert quotas.wait_s("free", 5.0) == 0
    assert (quotas.rate("a"), quotas.rate("free")) == (10, None)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_over_any_time_a_tenant_begins_no_more_than_its_quota(seed):
    """Whoever obeys `wait_s` has used at most burst + rate · time, and the one request that it overdraws."""
    rng = random.Random(seed)
    quotas = Quotas({"a": TenantConfig(tokens_per_s=10, burst_tokens=50)})
    now = used = 0.0
    for _ in range(200):
        now += rng.random()
        if quotas.wait_s("a", now) == 0:
            tokens = rng.randrange(1, 40)
            quotas.used("a", tokens, now)
            used += tokens
        assert used <= 50 + 10 * now + 40
