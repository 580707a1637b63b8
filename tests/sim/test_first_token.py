"""First tokens that wait for the second, in whole simulations."""

from __future__ import annotations

from typing import Any

import pytest

from core.config import Config
from core.cost_model import CostModel, StepCost
from sim.run import simulate
from sim.workload import Arrival

COST = StepCost(base_s=0.010, prefill_token_s=1e-4, prefill_pair_s=0.0, decode_row_s=2e-4, decode_context_s=0.0)
COME = [Arrival(n / 20, 100, 8) for n in range(100)]


def served(engine: str = "counted", *, hold: bool = True, ttft_s: float = 0.5, faults: tuple[Any, ...] = ()) -> dict[str, Any]:
    """Every message takes 20 ms, so a hand-off some 80; gaps are of 10 ms and may be of 20."""
    config = Config.model_validate(
        {
            "engine": {"block_size": 16, "kv_bytes": "64MiB", "max_running": 64, "max_step_tokens": 1024},
            "router": {"hold_first_token": hold},
            "sim": {
                "engine": engine,
                "pools": [{"role": "prefill", "count": 2}, {"role": "decode", "count": 2}],
                "links": {"bandwidth": 1e9, "latency": 0.020},
                "slo": {"ttft_s": ttft_s, "tbt_s": 0.020},
            },
        }
    )
    return simulate(config, COME, "least_load", 1, model=CostModel(COST, 64), faults=faults, checks=True).report


@pytest.mark.parametrize("engine", ["counted", "exact"])
def test_a_gap_that_would_be_too_long_is_spent_before_the_first_token(engine: str):
    kept, given = served(engine), served(engine, hold=False)
    assert given["attainment"]["ttft"] == kept["attainment"]["ttft"] == 1.0
    assert given["attainment"]["joint"] < 0.1
    assert kept["attainment"]["joint"] > 0.95
    assert kept["ttft_s"]["mean"] == pytest.approx(given["ttft_s"]["mean"] + given["tbt_s"]["mean"]), (
        "until the second one came"
    )
    assert kept["e2e_s"] == pytest.approx(given["e2e_s"]), "nothing is computed later"


def test_both_engines_keep_it_as_long():
    counted, exact = served("counted"), served("exact")
    for name in ("ttft_s", "tbt_s", "tpot_s"):
        assert counted[name] == pytest.approx(exact[name], rel=1e-6)


def test_where_the_first_token_has_no_time_left_it_is_given_at_once():
    assert served(ttft_s=0.05)["ttft_s"]["p50"] == pytest.approx(served(ttft_s=0.05, hold=False)["ttft_s"]["p50"], abs=0.01)
