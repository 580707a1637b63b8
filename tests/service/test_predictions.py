"""In a running cluster predictions come from what workers learned of their own steps, and are held against what came."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from in_loop import cluster_in_loop
from prometheus_client.parser import text_string_to_metric_families

from router.cost_columns import UNKNOWN_COST
from tandem import AsyncClient, Explanation, SamplingParams

pytestmark = pytest.mark.service

LEARNED_TIMEOUT_S = 60.0


def prompt(number: int) -> list[int]:
    """Of different lengths and never the same: a worker learns a line from several points."""
    return [300 + (7 * number + i) % 3000 for i in range(40 + 30 * (number % 8))]


async def asked(client: AsyncClient, number: int) -> Explanation:
    result = await client.generate(prompt(number), SamplingParams(max_tokens=4 + number % 6, temperature=0, ignore_eos=True))
    return await client.explain(result.request_id)


def assumed_s(tokens: int) -> float:
    return UNKNOWN_COST.prefill_s(tokens, chunk_tokens=256)


async def test_goodput_predicts_from_learned_costs_and_is_checked_against_what_came():
    async with cluster_in_loop({"router.policy": "goodput"}) as addresses, AsyncClient(addresses.grpc) as client:
        known, number = await asked(client, 0), 0
        chosen = known.decisions[-1].candidates[0]
        assert chosen.prefill_s == pytest.approx(assumed_s(known.prompt_tokens), rel=1e-3), "nobody has learned anything yet"
        async with asyncio.timeout(LEARNED_TIMEOUT_S):
            while True:
                number += 1
                known = await asked(client, number)
                split = [c for c in known.decisions[-1].candidates if c.placement.prefill != c.placement.decode]
                if split and abs(split[0].prefill_s / assumed_s(known.prompt_tokens) - 1) > 0.01 and split[0].overhead_s > 0:
                    break
        assert (known.policy, known.outcome is not None) == ("goodput", True)
        async with httpx.AsyncClient() as http:
            page = (await http.get(f"http://{addresses.http}/metrics")).text
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }
    policy = ("policy", "goodput")
    assert samples["tandem_router_ttft_prediction_error_ratio_count", policy] == number + 1
    assert samples["tandem_router_tpot_prediction_error_ratio_count", policy] == number + 1
    by_class = ("tandem_router_goodput_total", ("class", known.slo_class))
    counted = sum(value for name, value in samples.items() if name[:2] == by_class)
    assert counted == number + 1, "each is counted once, whatever limits a busy machine lets it miss"
    for part in ("queue", "prefill", "first_decode"):
        assert samples["tandem_router_request_part_seconds_count", ("part", part)] > 0
