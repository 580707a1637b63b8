"""What a call is served on: tables of configuration and call, and what is refused."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.config import RouterConfig, load
from core.errors import ConfigError, InvalidRequestError
from core.request import Slo
from router.frontend_types import FrontRequest
from router.slo import Terms, TermsOf, check_limits

TENANTS = {"gold": {"weight": 4.0, "slo_class": "interactive"}, "free": {"tokens_per_s": 10.0}}


def terms(config: dict | None = None, slo: Slo | None = None, **asked: object) -> Terms:
    return TermsOf(RouterConfig.model_validate(config or {}))(FrontRequest("hi", slo=slo or Slo(), **asked))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "asked", "expected"),
    [
        ({}, {}, Terms("standard", "default", Slo(5.0, 0.25))),
        ({}, {"slo_class": "interactive"}, Terms("interactive", "default", Slo(1.0, 0.1), 10)),
        ({}, {"slo_class": "batch", "priority": 3}, Terms("batch", "default", Slo(), -7)),
        ({}, {"tenant": "anybody", "deadline_s": 9.0}, Terms("standard", "anybody", Slo(5.0, 0.25), 0, 9.0)),
        # limits of the call: alone they stand alone, with a class they replace its own one by one
        ({}, {"slo": Slo(ttft_s=2.0)}, Terms("standard", "default", Slo(2.0))),
        ({}, {"slo": Slo(ttft_s=2.0), "slo_class": "interactive"}, Terms("interactive", "default", Slo(2.0, 0.1), 10)),
        ({"tenants": TENANTS}, {"tenant": "gold"}, Terms("interactive", "gold", Slo(1.0, 0.1), 10)),
        ({"tenants": TENANTS}, {"tenant": "free"}, Terms("standard", "free", Slo(5.0, 0.25))),
        ({"tenants": {"default": {}}}, {}, Terms("standard", "default", Slo(5.0, 0.25))),
        ({"classes": {"standard": {"ttft_s": 0.3}}}, {}, Terms("standard", "default", Slo(0.3, 0.25))),
        ({"classes": {"bulk": {"priority": -1}}, "default_class": "bulk"}, {}, Terms("bulk", "default", Slo(), -1)),
    ],
)  # fmt: skip
def test_class_tenant_and_limits(config, asked, expected):
    assert terms(config, **asked) == expected


@pytest.mark.parametrize(
    ("config", "asked", "says"),
    [
        ({}, {"slo_class": "urgent"}, "slo_class 'urgent' .* batch, interactive, standard"),
        ({"tenants": TENANTS}, {"tenant": "nobody"}, "tenant 'nobody' .* free, gold"),
        ({"tenants": TENANTS}, {}, "names no tenant; name one of free, gold"),
        ({}, {"tenant": "x" * 200}, "at most 128"),
        ({}, {"tenant": "a\nb"}, "printable"),
        ({}, {"deadline_s": 1.0, "slo": Slo(ttft_s=2.0)}, r"ttft_slo_s \(2\) .* deadline_s \(1\)"),
        ({}, {"deadline_s": 1.0, "slo": Slo(tbt_s=2.0)}, "tbt_slo_s .* deadline_s"),
        ({}, {"slo": Slo(tbt_s=0.1, tpot_s=0.2)}, "lower tpot_slo_s"),
        ({}, {"deadline_s": 0.0}, "deadline_s must be a positive"),
        ({"tenants": {f"t{n:02}": {} for n in range(50)}}, {"tenant": "x"}, "t19 and 30 more"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(config, asked, says):
    with pytest.raises(InvalidRequestError, match=says):
        terms(config, **asked)


@pytest.mark.parametrize("limit_s", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("field", ["ttft_s", "tbt_s", "tpot_s"])
def test_limits_must_be_positive(field, limit_s):
    with pytest.raises(InvalidRequestError, match=field.replace("_s", "_slo_s")):
        check_limits(Slo(**{field: limit_s}), None)
    check_limits(Slo(**{field: 0.001}), None)


@settings(deadline=None)
@given(
    slo=st.builds(Slo, *[st.none() | st.floats()] * 3),
    deadline_s=st.none() | st.floats(),
    slo_class=st.text(max_size=5) | st.sampled_from(["interactive", "batch"]),
    tenant=st.text(max_size=5) | st.sampled_from(["gold", "free"]),
    priority=st.integers(-(2**31), 2**31 - 1),
)
def test_any_call_is_served_on_known_terms_or_refused(slo, deadline_s, slo_class, tenant, priority):
    try:
        found = terms({"tenants": TENANTS}, slo, deadline_s=deadline_s, slo_class=slo_class, tenant=tenant, priority=priority)
    except InvalidRequestError:
        return
    assert found.tenant in TENANTS
    assert found.slo_class in ("interactive", "standard", "batch")
    limits = [limit for limit in (found.slo.ttft_s, found.slo.tbt_s, found.slo.tpot_s, found.deadline_s) if limit is not None]
    assert all(0 < limit < math.inf for limit in limits)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("router.default_class", "urgent", "default_class is 'urgent'.*batch, interactive, standard"),
        ("router.tenants", {"a": {"slo_class": "x"}}, r"tenants\.a\.slo_class is 'x'"),
        ("router.tenants", {"a": {"weight": 0}}, r"router\.tenants\.a\.weight"),
        ("router.classes", {"interactive": {"ttft": 1}}, r"router\.classes\.interactive\.ttft: unknown key"),
        ("router.classes", {"interactive": 3}, r"router\.classes\.interactive"),
        ("router.queue", "random", "router.queue"),
        ("router.admission", "maybe", "router.admission"),
    ],
)
def test_a_configuration_that_contradicts_itself_is_refused(key, value, says):
    with pytest.raises(ConfigError, match=says):
        load(overrides={key: value})


def test_the_configuration_survives_its_journey_to_a_process():
    config = load(
        overrides={"router.classes": {"bulk": {"priority": -1}, "batch": {"queue_share": 0.1}}, "router.tenants": TENANTS}
    )
    assert type(config).model_validate(config.model_dump(mode="json")) == config
    assert config.router.classes["batch"].priority == -10
