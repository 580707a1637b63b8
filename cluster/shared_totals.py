"""What all routers together served of each tenant, in the Redis that the configuration names."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping

from core.hostspec import HostSpec
from kvtransfer.redis_link import open_link
from kvtransfer.redis_scripts import Script
from kvtransfer.redis_url import parse_redis_url
from router import main as router
from router.sharing import Service

TIMEOUT_S = 1.0
TENANTS_AT_A_TIME = 256
_TENANTS_MAX = 100_000
_KEPT_MS = 24 * 3600 * 1000

# Totals may begin anew at any time, so a table that was forgotten or has grown too long is simply dropped.
_TEXT = f"""
local table, answer = KEYS[1] .. 'service', {{}}
if redis.call('HLEN', table) > {2 * _TENANTS_MAX} then redis.call('DEL', table) end
for i = 1, #ARGV, 3 do
  answer[#answer + 1] = redis.call('HINCRBYFLOAT', table, 'w:' .. ARGV[i], ARGV[i + 1])
  answer[#answer + 1] = redis.call('HINCRBYFLOAT', table, 't:' .. ARGV[i], ARGV[i + 2])
end
redis.call('PEXPIRE', table, {_KEPT_MS})
return answer
"""
ADD = Script(_TEXT, hashlib.sha1(_TEXT.encode(), usedforsecurity=False).hexdigest())


class RedisTotals:
    """See `router.exchange.Totals`. Raises ConfigError when made with a URL that is none; connects when first used."""

    def __init__(self, url: str, timeout_s: float = TIMEOUT_S) -> None:
        target = parse_redis_url(url)
        self._link = open_link(target, timeout_s)
        self._prefix = f"{target.prefix}{{fair}}".encode()
        self._timeout_s = timeout_s

    async def add(self, told: Mapping[str, Service]) -> list[Service]:
        """Raises DirectoryError, with nothing known of what arrived; a round trip for every few hundred tenants."""
        totals: list[Service] = []
        tenants = list(told.items())
        for start in range(0, len(tenants), TENANTS_AT_A_TIME):
            part = tenants[start : start + TENANTS_AT_A_TIME]
            args = [word for tenant, service in part for word in (tenant, *map(repr, service))]
            answer = [float(value) for value in await self._link.run(self._prefix, ADD, args, self._timeout_s)]
            totals += map(Service, answer[::2], answer[1::2])
        return totals

    async def close(self) -> None:
        await self._link.close()


async def run_router(spec: HostSpec, stop: asyncio.Event) -> None:
    """`router.main.run`, sharing what tenants were served with the other routers where there is a Redis."""
    if not spec.config.redis:
        await router.run(spec, stop)
        return
    totals = RedisTotals(spec.config.redis)
    try:
        await router.run(spec, stop, totals=totals)
    finally:
        await totals.close()
