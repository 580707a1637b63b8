"""Where a request goes: the view, the claims, the policy, the queue."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.blocks import KvLayout
from core.errors import ConfigError, UnavailableError
from core.report import WorkerState
from core.request import WorkerRole
from router.modelcard import ModelKnowledge
from router.policies import make_policy
from router.policy import PREFILL_WINDOW_TOKENS, LeastLoad, Need, Nobody, Pair
from router.situation import Situation
from router.view import NO_CLAIM, Claim, Claims, ClusterView, WorkerView

P, D, C = WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.COLOCATED
LAYOUT = KvLayout(b"f" * 16, "float32", 1, 1, 8, 16)


def worker(name: str, role: WorkerRole, **fields: object) -> WorkerView:
    made = WorkerView(name, role, 1, WorkerState.READY, "127.0.0.1:1", blocks_total=100, blocks_free=100, layout=LAYOUT)
    return replace(made, max_model_len=512, vocab_size=100, model_name="m", **fields)  # type: ignore[arg-type]


def view(*workers: WorkerView) -> ClusterView:
    return ClusterView(1, MappingProxyType({w.worker_id: w for w in workers}))


def situation(*workers: WorkerView, claims: Claims | None = None, connected: set[str] | None = None) -> Situation:
    names = frozenset(w.worker_id for w in workers) if connected is None else frozenset(connected)
    return Situation(view(*workers), names, claims or Claims())


POOL = (worker("p0", P), worker("p1", P), worker("d0", D), worker("d1", D))
CASES = {
    "equal load: the first of each": (POOL, Pair("p0", "d0")),
    "fewest waiting tokens": ((worker("p0", P, waiting_tokens=9), *POOL[1:]), Pair("p1", "d0")),
    "fewest running": ((*POOL[:2], worker("d0", D, running=2), worker("d1", D, running=1)), Pair("p0", "d1")),
    "then the most room": ((*POOL[:2], worker("d0", D, blocks_free=3), POOL[3]), Pair("p0", "d1")),
    "cached blocks are room": (
        (*POOL[:2], worker("d0", D, blocks_free=3, blocks_cached=97), worker("d1", D, blocks_free=99)),
        Pair("p0", "d0"),
    ),
    "draining takes nothing new": ((worker("p0", P, state=WorkerState.DRAINING), *POOL[1:]), Pair("p1", "d0")),
    "colocated alone": ((worker("c0", C),), Pair(None, "c0")),
    "a pair before an equal colocated": ((*POOL, worker("c0", C)), Pair("p0", "d0")),
    "a colocated when the pair is busier": (
        (worker("p0", P, waiting_tokens=500), worker("d0", D), worker("c0", C, running=2)),
        Pair(None, "c0"),
    ),
    "half a pair and a colocated": ((worker("p0", P), worker("c0", C, running=60)), Pair(None, "c0")),
    "half a pair": ((worker("p0", P),), Nobody("no decode worker is connected", busy=False)),
    "nobody": ((), Nobody("no prefill and no decode worker is connected", busy=False)),
}


@pytest.mark.parametrize("name", CASES)
def test_least_load(name: str):
    workers, expected = CASES[name]
    assert LeastLoad().decide(situation(*workers), Need(10)).place == expected


def test_what_is_not_connected_or_to_be_avoided_is_not_chosen():
    here = situation(*POOL, connected={"p1", "d0", "d1"})
    assert LeastLoad().decide(here, Need(10, avoid=frozenset({"d0"}))).place == Pair("p1", "d1")
    refused = LeastLoad().decide(here, Need(10, avoid=frozenset({"d0", "d1"}))).place
    assert isinstance(refused, Nobody)
    assert refused.busy


def test_own_claims_count_before_the_next_report():
    claims = Claims()
    claims.swap(NO_CLAIM, Claim("p0", 100, "d0"))
    assert LeastLoad().decide(situation(*POOL, claims=claims), Need(10)).place == Pair("p1", "d1")


def test_a_full_window_keeps_prompts_here():
    claims = Claims()
    pool = (POOL[0], POOL[2])
    claims.swap(NO_CLAIM, Claim("p0", PREFILL_WINDOW_TOKENS, "d0"))
    busy = LeastLoad().decide(situation(*pool, claims=claims), Need(10)).place
    assert isinstance(busy, Nobody)
    assert busy.busy
    claims.swap(Claim("p0", PREFILL_WINDOW_TOKENS, "d0"), Claim(None, 0, "d0"))
    huge = Need(PREFILL_WINDOW_TOKENS * 10)
    assert LeastLoad().decide(situation(*pool, claims=claims), huge).place == Pair("p0", "d0"), "alone, any prompt may go"


def test_siblings_stay_together_while_they_can():
    prefer = Pair("p1", "d1")
    assert LeastLoad().decide(situation(*POOL), Need(10, prefer=prefer)).place == prefer
    assert LeastLoad().decide(situation(*POOL), Need(10, frozenset({"d1"}), prefer)).place == Pair("p0", "d0")
    whole = Pair(None, "c0")
    assert LeastLoad().decide(situation(*POOL, worker("c0", C, running=9)), Need(10, prefer=whole)).place == whole


def test_policies_are_chosen_by_name():
    assert isinstance(make_policy("least_load"), LeastLoad)
    with pytest.raises(ConfigError, match="choose one of conductor, goodput, kv_cost, least_load"):
        make_policy("best")


claims_drawn = st.builds(Claim, st.sampled_from([None, "a", "b"]), st.integers(0, 50), st.sampled_from([None, "a", "b"]))


@given(st.lists(claims_drawn, max_size=20))
def test_claims_add_up(drawn: list[Claim]):
    claims = Claims()
    for claim in drawn:
        claims.swap(NO_CLAIM, claim)
    for name in ("a", "b"):
        assert claims.prefills(name) == sum(c.prefill == name for c in drawn)
        assert claims.prefill_tokens(name) == sum(c.prefill_tokens for c in drawn if c.prefill == name)
        assert claims.running(name) == sum(c.decode == name for c in drawn)
    for claim in drawn:
        claims.swap(claim, NO_CLAIM)
    assert claims.is_empty()


def test_a_snapshot_that_does_not_name_a_connected_worker_keeps_it():
    old, new = view(*POOL), view(POOL[0])
    kept = new.keeping(old, frozenset({"d0"}), 1.0)
    assert set(kept.workers) == {"p0", "d0"}
    dead = view(replace(POOL[2], state=WorkerState.DEAD)).keeping(old, frozenset({"d0"}), 1.0)
    assert dead.workers["d0"].state is WorkerState.DEAD, "what a snapshot does say, counts"


def test_the_model_card_is_the_tightest_worker_and_is_remembered():
    knowledge = ModelKnowledge("", "1.0")
    with pytest.raises(UnavailableError):
        knowledge.card(view())
    card = knowledge.card(view(worker("p0", P), replace(worker("d0", D), max_model_len=300)))
    assert (card.name, card.max_model_len, card.vocab_size, card.dtype) == ("m", 300, 100, "float32")
    assert knowledge.card(view()) == card
    small = knowledge.card(view(worker("p0", P), replace(worker("d0", D), blocks_total=10)))
    assert small.max_model_len == 160, "more than the KV memory holds could never run"
    assert ModelKnowledge("mine", "1").card(view(worker("c0", C))).name == "mine"
