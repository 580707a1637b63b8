"""A worker with room for one, and many who wait: whoever is next goes when the one before has ended, whatever the policy."""

from __future__ import annotations

import asyncio

import pytest
from router_rig import request, rig

from core.config import RouterConfig
from router.policies import POLICIES

pytestmark = [pytest.mark.service, pytest.mark.asyncio]

WAITING = 40


@pytest.mark.parametrize("shape", [(1, 1, 0), (0, 0, 1)], ids=["split", "colocated"])
@pytest.mark.parametrize("policy", sorted(POLICIES))
async def test_those_who_wait_ask_when_a_place_comes_free(policy: str, shape: tuple[int, int, int]):
    """Each asks when it comes, and when its turn does; the one behind it may ask in vain."""
    async with rig(*shape, config=RouterConfig(policy=policy), room=1) as r:
        await asyncio.gather(*(r.generate(request(max_tokens=3, seed=n, request_id=f"r{n}")) for n in range(WAITING)))
        for worker in r.workers.values():
            asked = [key for kind, key in worker.seen if kind in ("reserve", "generate_local")]
            assert len(asked) <= 4 * WAITING
        await r.all_free()
