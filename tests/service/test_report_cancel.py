"""A reporter ends when it is cancelled, at whatever moment: grpc.aio loses cancellations while a call is set up."""

import asyncio

import pytest
from worker_harness import DEADLINE_S, NOBODY

from core.config import load
from core.hostspec import HostSpec
from core.reporter import Reporter, first_report
from core.request import WorkerRole

pytestmark = pytest.mark.service


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 5, 8, 13, 21])
async def test_a_reporter_without_a_controller_can_be_cancelled_at_every_moment(turns):
    spec = HostSpec("r", WorkerRole.DECODE, 1, load(overrides={"model.path": "nobody/loads-it"}), controller=NOBODY)
    for _ in range(20):
        task = asyncio.create_task(Reporter(spec, lambda: first_report(spec), lambda _: None).run())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        done, _ = await asyncio.wait({task}, timeout=DEADLINE_S)
        assert done, "it goes on reporting"
        assert task.cancelled()
