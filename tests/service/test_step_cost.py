"""A worker learns what its steps cost, and says so."""

import asyncio

import pytest
from worker_harness import connected, item, running

from core.request import WorkerRole

pytestmark = pytest.mark.service


async def test_a_worker_that_served_knows_its_steps():
    async with running(WorkerRole.COLOCATED) as worker, connected(worker) as router:
        assert not [name for name in await worker.metrics() if "step_cost" in name], "nothing is known yet"
        for turn in range(6):
            lengths = (17, 40, 90, 150, 200)[: 1 + turn]
            await asyncio.gather(*(router.local(item(f"{turn}-{length}", length, max_tokens=20)) for length in lengths))
        known = await worker.metrics()
        terms = [value for name, value in known.items() if name.startswith("tandem_engine_step_cost_seconds")]
        assert len(terms) == 5
        assert min(terms) >= 0 < max(terms)
        assert known['tandem_engine_step_cost_error{quantile="0.5"}'] < 1
