"""Spans: whose trace they continue, what they say of a decision, and the form a collector takes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.spans import Ended, Parent, export_of, parent_of

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
WHY = {
    "request_id": "r1", "policy": "goodput", "slo_class": "standard",
    "decisions": [
        {"at_s": 0.0, "reason": "no room"},
        {"at_s": 0.1, "reason": "fits", "placement": {"prefill": "p", "decode": "d"},
         "candidates": [{"ttft_s": 0.2, "tpot_s": 0.01}]},
    ],
    "outcome": {"finish": "length", "timing": {"ttft_s": 0.25, "tpot_s": 0.02}, "placement": {"prefill": "p", "decode": "d2"},
                "failovers": 1},
}  # fmt: skip


def span(why: object = WHY, parent: Parent | None = None) -> Any:
    text = None if why is None else json.dumps(why)
    tree = export_of([Ended("r1", text, parent, "a" * 32, "b" * 16, 1_000, 2_000)], "router-0")
    return tree["resourceSpans"][0]["scopeSpans"][0]["spans"][0]


def said(one: Any) -> Any:
    return {each["key"].removeprefix("tandem."): next(iter(each["value"].values())) for each in one["attributes"]}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (f"00-{TRACE}-{SPAN}-01", Parent(TRACE, SPAN, True)),
        (f" 00-{TRACE.upper()}-{SPAN}-00", Parent(TRACE, SPAN, False)),
        (f"ff-{TRACE}-{SPAN}-01", None),
        (f"00-{'0' * 32}-{SPAN}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE}-{SPAN}", None),
        ("", None),
    ],
)
def test_a_traceparent_is_read_as_w3c_says(text: str, found: Parent | None) -> None:
    assert parent_of(text) == found


@given(st.text())
def test_any_text_is_a_parent_or_none(text: str) -> None:
    assert parent_of(text) is None or len(text) >= 55


def test_a_span_says_where_the_request_went_why_and_what_came_of_it() -> None:
    one = span()
    assert (one["traceId"], one["startTimeUnixNano"], "parentSpanId" in one) == ("a" * 32, "1000", False)
    values = said(one)
    assert json.loads(values.pop("explain")) == WHY
    assert values == {
        "request_id": "r1", "policy": "goodput", "slo_class": "standard", "placement.prefill": "p", "placement.decode": "d2",
        "reason": "fits", "finish": "length", "failovers": "1", "ttft_s.predicted": 0.2, "ttft_s": 0.25,
        "tpot_s.predicted": 0.01, "tpot_s": 0.02,
    }  # fmt: skip


def test_a_span_continues_its_parents_trace_and_a_refusal_is_an_error() -> None:
    refused = {"decisions": [{"at_s": 0.0, "reason": "full"}], "outcome": {"finish": "overloaded", "message": "full; retry"}}
    one = span(refused, Parent(TRACE, SPAN, True))
    assert (one["traceId"], one["parentSpanId"]) == (TRACE, SPAN)
    assert one["status"] == {"code": 2, "message": "full; retry"}
    assert said(span(None)) == {"request_id": "r1", "failovers": "0"}
