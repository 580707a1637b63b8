"""Headers say what a body may say, and never the contrary."""

from __future__ import annotations

import pytest

from core.request import Slo
from router.openai_fields import FieldError
from router.openai_headers import with_headers
from router.openai_types import read_completion

BODY = b'{"model": "m", "prompt": ["a", "b"]%s}'


def read(headers: dict[str, str], more: str = ""):
    call = read_completion(BODY % (", " + more if more else "").encode())
    return with_headers(call, [(key.lower().encode(), value.encode()) for key, value in headers.items()])


def test_every_header_reaches_every_prompt_of_the_call():
    call = read(
        {
            "X-Tandem-Tenant": "gold",
            "x-tandem-slo-class": "batch",
            "x-tandem-ttft-slo-s": "0.5",
            "x-tandem-tbt-slo-s": "0.2",
            "x-tandem-tpot-slo-s": "0.1",
            "x-tandem-deadline-s": "9",
            "x-tandem-priority": "-3",
            "x-tandem-explain": "1",
            "content-type": "application/json",
        }
    )
    assert len(call.requests) == 2
    for request in call.requests:
        assert (request.tenant, request.slo_class, request.priority, request.deadline_s) == ("gold", "batch", -3, 9.0)
        assert request.slo == Slo(0.5, 0.2, 0.1)


def test_the_body_says_the_same_as_the_header_or_nothing():
    assert read({"x-tandem-tenant": "a"}, '"tenant": "a"').requests[0].tenant == "a"
    with pytest.raises(FieldError, match="tenant is 'b' in the body and 'a' in x-tandem-tenant") as refused:
        read({"x-tandem-tenant": "a"}, '"tenant": "b"')
    assert refused.value.param == "tenant"


@pytest.mark.parametrize("header", ["ttft-slo-s", "deadline-s", "priority"])
@pytest.mark.parametrize("value", ["soon", "", "1.5.2"])
def test_values_that_are_none_are_refused_by_name(header, value):
    with pytest.raises(FieldError, match=f"x-tandem-{header} must be"):
        read({f"x-tandem-{header}": value})
    with pytest.raises(FieldError, match="32 bits"):
        read({"x-tandem-priority": str(2**31)})


def test_the_fields_of_a_body_reach_the_request():
    request = read({}, '"tenant": "t", "deadline_s": 2.5, "slo_class": "batch"').requests[0]
    assert (request.tenant, request.deadline_s, request.slo_class) == ("t", 2.5, "batch")
