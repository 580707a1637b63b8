"""What is kept of decisions: bounded, the latest first to stay, forgotten whole."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import NotFoundError
from core.request import Slo
from router.decisions import CANDIDATES_MAX, PER_REQUEST_MAX, Decisions, Explanation, Outcome
from router.explain import header_of, wanted
from router.frontend_types import Placement, Timing
from router.policy import Candidate, Decision, Nobody, Pair
from router.prediction import PredictionErrors

PAIR = Pair("p0", "d0")


def about(request_id: str) -> Explanation:
    return Explanation(request_id, "goodput", "standard", Slo(ttft_s=1.0), 100, 20)


def candidate(ttft_s: float = 0.1, tpot_s: float = 0.01) -> Candidate:
    return Candidate(PAIR, ttft_s, tpot_s, ttft_s, "within limits", prefill_s=ttft_s, tpot_s=tpot_s)


def placed(ttft_s: float = 0.1, tpot_s: float = 0.01, candidates: int = 1) -> Decision:
    return Decision(PAIR, (candidate(ttft_s, tpot_s),) * candidates, "the only place")


def outcome(ttft_s: float = 0.2, tpot_s: float = 0.02, failovers: int = 0) -> Outcome:
    return Outcome("stop", Timing(ttft_s=ttft_s, tpot_s=tpot_s), 20, 0, failovers, Placement("p0", "d0"))


def test_a_decision_is_explained_with_what_was_predicted_and_what_came():
    decisions = Decisions()
    decisions.decided(about("a"), 0.0, Decision(Nobody("every prefill worker has a full window of prompts", busy=True)))
    decisions.decided(about("a"), 0.05, placed(candidates=CANDIDATES_MAX + 3))
    decisions.ended("a", outcome(ttft_s=0.25))
    known = decisions.explain("a")
    assert [(made.at_s, made.place) for made in known.decisions] == [(0.0, None), (0.05, PAIR)]
    assert known.decisions[0].reason == "every prefill worker has a full window of prompts"
    assert len(known.last.candidates) == CANDIDATES_MAX
    assert known.ttft_error == pytest.approx(0.5), "0.1 s were predicted of the 0.2 s after the decision"
    assert known.tpot_error == pytest.approx(0.5)


def test_what_is_unknown_says_how_many_are_kept():
    decisions = Decisions(kept_max=3)
    for number in range(5):
        decisions.decided(about(f"r{number}"), 0.0, placed())
    assert len(decisions) == 3
    assert decisions.explain("r2").request_id == "r2"
    with pytest.raises(NotFoundError, match=r"'r1' is kept; .* last 3 decisions and has 3 now, of 3 requests"):
        decisions.explain("r1")


def test_one_request_cannot_push_all_others_out():
    decisions = Decisions(kept_max=20)
    decisions.decided(about("quiet"), 0.0, placed())
    for number in range(100):
        known = decisions.decided(about("restless"), float(number), placed())
    assert (len(known.decisions), known.forgotten) == (PER_REQUEST_MAX, 100 - PER_REQUEST_MAX)
    assert known.last.at_s == 99.0
    assert decisions.explain("quiet")
    assert len(decisions) == 1 + PER_REQUEST_MAX


def test_an_id_used_again_is_explained_by_its_latest_use():
    decisions = Decisions()
    decisions.decided(about("a"), 0.0, placed(ttft_s=9.0))
    decisions.ended("a", outcome())
    decisions.decided(about("a"), 0.0, placed(ttft_s=0.5))
    known = decisions.explain("a")
    assert (len(known.decisions), known.outcome, len(decisions)) == (1, None, 1)
    assert known.last.candidates[0].ttft_s == 0.5


@pytest.mark.parametrize(
    ("decision", "came"),
    {
        "nothing was predicted": (Decision(PAIR), outcome()),
        "a failover came in between": (placed(), outcome(failovers=1)),
        "no token came": (placed(), outcome(ttft_s=0.0, tpot_s=0.0)),
        "nobody took it": (Decision(Nobody("no worker", busy=False)), outcome()),
    }.values(),
)
def test_no_error_where_there_is_nothing_to_compare(decision: Decision, came: Outcome):
    decisions, errors = Decisions(), PredictionErrors()
    decisions.decided(about("a"), 0.0, decision)
    known = decisions.ended("a", came)
    assert known is not None
    errors.ended(known)
    assert (known.ttft_error, known.tpot_error) == (None, None)
    assert not errors.ttft
    assert not errors.tpot


def test_errors_are_counted_per_policy():
    decisions, errors = Decisions(), PredictionErrors()
    for ttft_s in (0.1, 0.19):
        decisions.decided(about("a"), 0.0, placed(ttft_s=ttft_s))
        known = decisions.ended("a", outcome(ttft_s=0.2))
        assert known is not None
        errors.ended(known)
    assert errors.ttft["goodput"].count == 2
    assert errors.ttft["goodput"].sum == pytest.approx(0.5 + 0.05)
    assert decisions.ended("never seen", outcome()) is None


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.sampled_from(["decide", "refuse", "end"])), max_size=200), st.integers(1, 30))
def test_memory_is_bounded_and_the_latest_request_is_always_known(steps: list[tuple[int, str]], kept_max: int):
    decisions = Decisions(kept_max)
    for number, step in steps:
        request_id = f"r{number}"
        if step == "end":
            decisions.ended(request_id, outcome())
            continue
        decisions.decided(about(request_id), 0.0, placed() if step == "decide" else Decision(Nobody("full", busy=True)))
        assert decisions.explain(request_id).decisions
        assert len(decisions) <= max(kept_max, PER_REQUEST_MAX)
    kept = [decisions.explain(f"r{n}") for n in range(13) if f"r{n}" in decisions._known]
    assert sum(len(known.decisions) for known in kept) == len(decisions)


def test_the_header_is_one_short_line_of_ascii():
    decisions = Decisions()
    decisions.decided(about("a"), 0.0, Decision(Nobody("voll bis unters Dach, über alles", busy=True)))
    decisions.decided(about("a"), 0.1, placed(candidates=8))

    class Front:
        explain = staticmethod(decisions.explain)

    line = header_of(Front(), "a")  # type: ignore[arg-type]
    assert line is not None
    assert line.isascii()
    assert "\n" not in line
    tree = json.loads(line)
    assert (tree["policy"], len(tree["decisions"]), "outcome" in tree) == ("goodput", 1, False)
    decisions.ended("a", outcome())
    line = header_of(Front(), "a")  # type: ignore[arg-type]
    assert line is not None
    assert json.loads(line)["outcome"]["finish"] == "stop"
    assert len(line) < 2000
    assert header_of(Front(), "b") is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "asks"), [(None, False), ("", False), ("0", False), ("false", False), ("1", True), ("yes", True)]
)
def test_a_header_asks(value: str | None, asks: bool):
    assert wanted(value) is asks
