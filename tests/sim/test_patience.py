"""Whom the default policy lets go first, in whole simulations."""

from __future__ import annotations

from core.config import Config
from core.cost_model import CostModel, StepCost
from sim.requests import Request
from sim.run import simulate
from sim.workload import Arrival
from sim.world import World

COST = StepCost(base_s=0.010, prefill_token_s=1e-4, prefill_pair_s=0.0, decode_row_s=2e-4, decode_context_s=0.0)
TTFT_S = 0.2
CONFIG = Config.model_validate(
    {
        "engine": {"block_size": 16, "kv_bytes": "64MiB", "max_running": 64, "max_step_tokens": 1024},
        "sim": {"pools": [{"role": "prefill", "count": 2}, {"role": "decode"}], "slo": {"ttft_s": TTFT_S, "tbt_s": 0.1}},
    }
)


def test_a_prompt_that_is_late_anyway_keeps_nobody_from_a_free_worker():
    """Its tenant's turn comes first, and it waits for a lull: what others ask meanwhile goes to the worker that is free."""
    learned = [Arrival(0.05 * n, 200, 8, tenant="b") for n in range(20)]  # what steps and answers take
    stream, busy = Arrival(1.5, 50, 300, tenant="b"), Arrival(1.99, 1800, 8, tenant="b")
    late = Arrival(2.0, 2500, 8, tenant="a")  # 250 ms on any worker
    quick = [Arrival(2.02 + 0.02 * n, 200, 8, tenant="b") for n in range(10)]
    first_s: dict[int, list[float]] = {}

    def watch(world: World) -> None:
        ended = world.users.on_end

        def note(request: Request) -> None:
            first_s.setdefault(request.content.input_tokens, []).append(request.times[0] - request.arrived_at)
            ended(request)

        world.users.on_end = note

    simulate(CONFIG, [*learned, stream, busy, late, *quick], "goodput", 1, model=CostModel(COST, 64), prepare=watch)
    assert min(first_s[2500]) > TTFT_S
    assert len(first_s[200]) == 30
    assert max(first_s[200]) < TTFT_S


def test_when_more_come_than_gaps_allow_some_keep_their_limits_and_nobody_starves():
    """25 requests a second are all that decode within the limit of gaps; 38 come, for ten seconds, and all are answered."""
    slo = {"ttft_s": 0.5, "tbt_s": 0.02}
    config = Config.model_validate(
        {
            "engine": {"block_size": 16, "kv_bytes": "64MiB", "max_running": 256, "max_step_tokens": 1024},
            "sim": {"pools": [{"role": "prefill", "count": 2}, {"role": "decode"}], "slo": slo},
        }
    )
    come = [Arrival(n / 38, 50, 100) for n in range(380)]
    met = {}
    for policy in ("goodput", "least_load"):
        report = simulate(config, come, policy, 1, model=CostModel(COST, 64)).report
        assert report["completed"] == len(come)
        met[policy] = report["attainment"]["joint"]
    assert met["goodput"] > 0.5 > 0.1 > met["least_load"]
