"""The policies side by side: one set of workers, one router per policy, the same requests through each in turn."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AsyncExitStack
from statistics import fmean

from benchmarks.azure_lengths import Conversations
from benchmarks.goodput_search import SHARE, Curve, Plan, offer, say, search, warmed
from benchmarks.goodput_systems import Shape, grpc_target, ours, routers_beside
from benchmarks.rows import Row
from cli.attainment_plot import Line
from core.latency import RequestTrace
from core.request import Slo
from router.policies import POLICIES

SHAPE = Shape(2, 2, 0, 256)
FIRST = "goodput"
SHARED = 0.5
"""Of the prompts begin with one of a few common prefixes, so that there is something to be aware of."""
QUICK_POLICIES = (FIRST, "least_load", "conductor")
QUICK = (5.0, 0, 12.0, (1.0, 1.0))
FULL = (20.0, 2, 20.0, (0.5, 0.7, 0.85, 1.0, 1.0, 1.15, 1.35))
"""Seconds per rate and halvings of the first policy's own search, then seconds for which everybody is measured at once, and at
which parts of what the search found. With --quick that is one rate twice: of few requests at many rates nothing can be seen."""


async def policy_rows(
    load: Conversations, slo: Slo, quick: bool, chosen: Collection[str], first_rate: float, how: str
) -> tuple[list[Row], list[Line]]:
    """`chosen`: which others; empty: all of them, or the QUICK_POLICIES."""
    names = [FIRST, *sorted(set(POLICIES) - {FIRST})]
    chosen = {FIRST, *(chosen or (QUICK_POLICIES if quick else names))}
    measured = [name for name in names if name in chosen]
    search_s, halvings, duration_s, steps = QUICK if quick else FULL
    plan = Plan(search_s, halvings, first_rate / 2)  # the routers of all policies share the cores
    shared = Conversations(load.lengths, load.scale, SHARED)
    curves = await _curves(shared, slo, measured, plan, duration_s, steps)
    how = f"{SHAPE.name}; {SHARED:.0%} of prompts share one of {shared.prefixes} prefixes of {shared.prefix_tokens}; {how}"
    first, first_said = _rate(curves[FIRST])
    mean = {name: fmean(curve.joint.values()) for name, curve in curves.items()}
    rows = [Row(f"policy.{FIRST}", f"rate at {SHARE:.0%}, {FIRST} policy", first, "req/s", how=f"{first_said}; {how}")]
    rows.append(Row(f"attained.{FIRST}", f"attained at the rates of all policies, {FIRST}", mean[FIRST], "", how=how))
    for name in names[1:]:
        claim = f"rate at {SHARE:.0%}, {FIRST} / {name}"
        if name not in curves:
            rows.append(
                Row(f"policy.{name}", claim, None, "x", 1.0, ">=", name, "not asked for: --policies, or without --quick")
            )
            continue
        rate, said = _rate(curves[name])
        both = f"{FIRST} {first_said}, {name} {said}; {how}"
        ratio = first / rate if first and rate else None
        rows.append(Row(f"policy.{name}", claim, ratio, "x", 1.0, ">=", name, both))
        claim, part = f"attained at the same rates, {FIRST} / {name}", mean[FIRST] / max(mean[name], 1e-9)
        rows.append(Row(f"attained.{name}", claim, part, "x", 1.0, ">=", name, f"{name} {mean[name]:.1%}; {how}"))
    return rows, [Line(name, [*curve.joint.items()]) for name, curve in curves.items()]


def _rate(curve: Curve) -> tuple[float | None, str]:
    """A policy that attains it at no rate is given the lowest one that was offered. None: one rate says nothing of others."""
    if len(curve.joint) < 2:
        return None, "measured at one rate"
    if curve.rate is not None:
        return curve.rate, f"{curve.rate:.3g}/s"
    lowest = min(curve.joint)
    return lowest, f"below {lowest:.3g}/s"


async def _curves(
    load: Conversations, slo: Slo, names: list[str], plan: Plan, duration_s: float, steps: tuple[float, ...]
) -> dict[str, Curve]:
    with ours(SHAPE, FIRST) as cluster, routers_beside(cluster, SHAPE, names) as addresses:
        async with AsyncExitStack() as stack:
            targets = {
                name: await stack.enter_async_context(warmed(grpc_target(address, slo), load))
                for name, address in addresses.items()
            }
            first = await search(targets[FIRST], load, slo, plan, FIRST)
            around = first.rate or min(first.joint)
            curves, found = {name: Curve() for name in names}, dict[tuple[str, float], list[RequestTrace]]()
            for number, part in enumerate(steps):
                rate = around * part
                for name in names[number % len(names) :] + names[: number % len(names)]:  # nobody always comes first
                    content = 1 + names.index(name)
                    traces = found.setdefault((name, rate), [])
                    traces += await offer(targets[name], load, rate, duration_s, 100 + number, content)
                    say(f"{name}: {curves[name].put(rate, traces, slo):.0%} of {rate:.2f}/s, {len(traces)} requests")
    return curves
