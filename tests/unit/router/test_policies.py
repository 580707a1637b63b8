"""Every policy on small situations, and on any situation at all."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.blocks import KvLayout, block_keys, root_key
from core.cost_model import StepCost
from core.kv_changes import KvChanges
from core.report import WorkerState
from core.request import Slo, WorkerRole
from router.block_index import BlockIndex
from router.policies import POLICIES, make_policy
from router.policy import Need, Nobody, Pair
from router.situation import Situation
from router.view import NO_CLAIM, Claim, Claims, ClusterView, WorkerView

P, D, C = WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.COLOCATED
LAYOUT = KvLayout(b"f" * 16, "float32", 2, 2, 8, 16)
PROMPT = tuple(range(160))
KEYS = tuple(block_keys(root_key(LAYOUT.fingerprint), PROMPT, 16))


def worker(name: str, role: WorkerRole, **fields: object) -> WorkerView:
    made = WorkerView(name, role, 1, WorkerState.READY, "127.0.0.1:1", blocks_total=100, blocks_free=100, layout=LAYOUT)
    return replace(made, **fields)  # type: ignore[arg-type]


def situation(*workers: WorkerView, cached: dict[str, int] | None = None, claims: Claims | None = None) -> Situation:
    index = BlockIndex(10_000)
    for name, blocks in (cached or {}).items():
        index.heard(name, KvChanges(0, 1, b"".join(KEYS[:blocks])))
    view = ClusterView(1, MappingProxyType({w.worker_id: w for w in workers}))
    return Situation(view, frozenset(view.workers), claims or Claims(), index, stale_after_s=3.0)


def pool(count: int = 3, **first: object) -> tuple[WorkerView, ...]:
    return (worker("p0", P, **first), *(worker(f"p{n}", P) for n in range(1, count)), worker("d0", D), worker("d1", D))


def chosen(policy: str, here: Situation, **need: object) -> str | None:
    place = make_policy(policy).decide(here, Need(len(PROMPT), keys=KEYS, **need)).place  # type: ignore[arg-type]
    assert isinstance(place, Pair)
    return place.prefill


def test_random_follows_the_draw():
    assert {chosen("random", situation(*pool()), draw=draw) for draw in range(3)} == {"p0", "p1", "p2"}


def test_round_robin_takes_turns():
    policy, here = make_policy("round_robin"), situation(*pool())
    places = [policy.decide(here, Need(10)).place for _ in range(6)]
    assert [p.prefill for p in places if isinstance(p, Pair)] == ["p0", "p1", "p2"] * 2
    assert [p.decode for p in places if isinstance(p, Pair)] == ["d0", "d1"] * 3


@pytest.mark.parametrize("draw", range(12))
def test_power_of_two_never_takes_the_most_loaded_of_three(draw: int):
    assert chosen("power_of_two", situation(*pool(waiting_tokens=500)), draw=draw) != "p0"


@pytest.mark.parametrize("policy", ["prefix_aware", "kv_cost"])
def test_a_long_cached_prefix_wins_over_a_little_load(policy: str):
    workers = (worker("p0", P), worker("p1", P, waiting_tokens=40), worker("d0", D))
    assert chosen(policy, situation(*workers, cached={"p1": 9})) == "p1"


def test_prefix_aware_ignores_short_matches_and_unbalanced_pools():
    little = (worker("p0", P), worker("p1", P, waiting_tokens=40), worker("d0", D))
    assert chosen("prefix_aware", situation(*little, cached={"p1": 2})) == "p0", "20 % is below 0.3"
    flooded = (worker("p0", P), worker("p1", P, running=100, waiting_tokens=40), worker("d0", D))
    assert chosen("prefix_aware", situation(*flooded, cached={"p1": 9})) == "p0"


def test_kv_cost_counts_what_is_computed_and_what_is_held():
    full = (worker("p0", P, blocks_free=80), worker("p1", P), worker("d0", D))
    assert chosen("kv_cost", situation(*full, cached={"p0": 9})) == "p1", "9 blocks saved, 20 held"
    assert chosen("kv_cost", situation(*(replace(w, blocks_free=95) for w in full), cached={"p0": 9})) == "p0"


def test_conductor_prefers_an_idle_worker_that_fetches_over_a_busy_holder():
    cost = StepCost(1e-3, 1e-3, 0.0, 1e-3, 0.0)
    workers = (worker("p0", P, step_cost=cost), worker("p1", P, waiting_tokens=2000, step_cost=cost), worker("d0", D))
    assert chosen("conductor", situation(*workers, cached={"p1": 9})) == "p0"
    idle = (workers[0], replace(workers[1], waiting_tokens=0), workers[2])
    assert chosen("conductor", situation(*idle, cached={"p1": 9})) == "p1", "having them is quicker than fetching them"


def test_splitwise_joins_the_shortest_queue_and_the_emptiest_memory():
    workers = (*pool(2, waiting_tokens=5)[:2], worker("d0", D, blocks_free=10), worker("d1", D, blocks_free=90, running=3))
    assert make_policy("splitwise").decide(situation(*workers), Need(10)).place == Pair("p1", "d1")


def test_a_stale_report_does_not_make_a_worker_look_idle():
    workers = (
        worker("p0", P, age_s=10.0),
        worker("p1", P, waiting_tokens=10),
        worker("p2", P, waiting_tokens=50),
        worker("d0", D),
    )
    assert chosen("least_load", situation(*workers)) == "p1"


def test_negative_load_is_none_and_makes_nobody_else_look_idle():
    """The old report of p1 counts as the mean of the pool: not as less because p0 reports what cannot be."""
    nonsense = {"waiting_tokens": -(10**6), "running": -7, "waiting": -7, "context_tokens": -(10**6)}
    workers = (worker("p0", P, **nonsense), worker("p1", P, age_s=10.0), worker("p2", P, waiting_tokens=300), worker("d0", D))
    claims = Claims()
    claims.swap(NO_CLAIM, Claim("p0", 150, "d0", 150))
    here = situation(*workers, claims=claims)
    assert here.prefill.waiting_tokens.tolist() == [150, 100, 300]
    assert (here.prefill.running >= 0).all()
    assert (here.prefill.context >= 0).all()
    assert chosen("least_load", here) == "p1"


def test_claims_move_the_columns_without_a_new_view():
    claims, here = Claims(), None
    here = situation(*pool(2), claims=claims)
    assert chosen("least_load", here) == "p0"
    claim = Claim("p0", 50, "d0", 50)
    claims.swap(NO_CLAIM, claim)
    here.moved(claim)
    assert make_policy("least_load").decide(here, Need(10)).place == Pair("p1", "d1")


some = st.none() | st.sampled_from([f"w{n}" for n in range(7)])
costs = st.none() | st.builds(StepCost, *[st.floats(0, 1e3)] * 5)
counts = st.integers(-5, 2**32 - 1)
workers_drawn = st.builds(
    WorkerView,
    worker_id=st.sampled_from([f"w{n}" for n in range(6)]),
    role=st.sampled_from([P, D, C, WorkerRole.STORE, WorkerRole.ROUTER]),
    epoch=st.integers(0, 3),
    state=st.sampled_from(list(WorkerState)),
    address=st.just("127.0.0.1:1"),
    running=counts,
    waiting=counts,
    waiting_tokens=counts,
    context_tokens=counts,
    step_cost=costs,
    blocks_total=counts,
    blocks_free=counts,
    blocks_cached=counts,
    age_s=st.floats(0, 100),
    layout=st.sampled_from([None, LAYOUT]),
)


@settings(max_examples=300, deadline=None)
@given(
    policy=st.sampled_from(sorted(POLICIES)),
    workers=st.lists(workers_drawn, max_size=6, unique_by=lambda w: w.worker_id),
    connected=st.sets(st.sampled_from([f"w{n}" for n in range(7)])),
    avoid=st.sets(st.sampled_from([f"w{n}" for n in range(7)])),
    cached=st.dictionaries(st.sampled_from([f"w{n}" for n in range(7)]), st.integers(0, 10)),
    draw=st.integers(0, 2**64 - 1),
    tokens=st.integers(1, 200),
    slo=st.builds(Slo, ttft_s=st.none() | st.floats(1e-9, 1e9), tbt_s=st.none() | st.floats(1e-9, 1e9)),
    answer=st.integers(0, 10**6),
    prefer=st.none() | st.builds(Pair, st.sampled_from([None, "w0", "w1"]), st.sampled_from(["w0", "w1", "w9"])),
    claimed=st.lists(st.builds(Claim, some, st.integers(0, 10**5), some, st.integers(0, 10**5)), max_size=5),
    now=st.floats(0, 1e6),
)
def test_no_policy_raises_or_places_where_it_must_not(
    policy, workers, connected, avoid, cached, draw, tokens, slo, answer, prefer, claimed, now
):
    view = ClusterView(1, MappingProxyType({w.worker_id: w for w in workers}))
    claims = Claims()
    for claim in claimed:
        claims.swap(NO_CLAIM, claim, now / 2)
    here = replace(situation(*workers, cached=cached, claims=claims), view=view, connected=frozenset(connected))
    need = Need(tokens, frozenset(avoid), prefer, KEYS[: tokens // 16], draw, slo, answer, now)
    place = make_policy(policy).decide(here, need).place
    usable = {w.worker_id for w in workers if w.state is WorkerState.READY} & connected - avoid
    roles = {w.worker_id: w.role for w in workers}
    if isinstance(place, Nobody):
        pairs = {P, D} <= {roles[name] for name in usable}
        assert not pairs or place.busy
        assert C not in {roles[name] for name in usable}
    else:
        assert place.decode in usable
        assert place.prefill is None or (place.prefill in usable and roles[place.prefill] is P)
        assert roles[place.decode] in ((D,) if place.prefill else (C, D))


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("roles", [(C,), (C, P), (C, D), (P, D), (P,), (D,), ()])
def test_every_shape_of_cluster_is_decided_on(policy: str, roles: tuple[WorkerRole, ...]):
    here = situation(*(worker(f"w{n}", role) for n, role in enumerate(roles)))
    place = make_policy(policy).decide(here, Need(len(PROMPT), keys=KEYS, output_tokens=10)).place
    assert isinstance(place, Pair) == (C in roles or {P, D} <= set(roles))


def test_where_only_somebody_to_avoid_has_room_somebody_is_asked_all_the_same():
    full = {"blocks_free": 0, "blocks_cached": 0}
    here = situation(worker("p0", P), worker("d0", D), worker("d1", D, **full))
    assert make_policy("goodput").decide(here, Need(160, frozenset({"d0"}), output_tokens=9)).place == Pair("p0", "d1")
