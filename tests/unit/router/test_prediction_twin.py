"""The bars of prediction hold on a twin whose steps take what they cost, at any load, and with costs that workers got wrong."""

from __future__ import annotations

import pytest
from prediction_twin import Twin

from core.cost_model import StepCost
from core.latency import percentile
from router.decisions import relative_error

COST = StepCost(base_s=2e-3, prefill_token_s=2e-4, prefill_pair_s=1e-7, decode_row_s=3e-4, decode_context_s=5e-7)
PROMPT_S = 0.065
"""What the mean prompt takes of it alone."""
LEARNED_AFTER = 60


@pytest.mark.parametrize("believed", [1.0, 3.0, 0.3])
@pytest.mark.parametrize("load", [0.2, 0.5, 0.8])
def test_errors_stay_within_the_bars(load: float, believed: float):
    done = Twin(COST, COST.scaled(believed), load / PROMPT_S).run(300)[LEARNED_AFTER:]
    ttft, tpot = [], []
    for request in done:
        timing, chosen = request.facts.timing(0.0), request.chosen
        assert chosen is not None
        ttft.append(relative_error(chosen.ttft_s, timing.ttft_s))
        if timing.tpot_s > 0:
            tpot.append(relative_error(chosen.tpot_s, timing.tpot_s))
    for errors in (sorted(ttft), sorted(tpot)):
        assert percentile(errors, 50) <= 0.15
        assert percentile(errors, 90) <= 0.40
