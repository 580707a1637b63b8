"""How many tokens a tenant may use: a token bucket for each that has a quota. Deciding code.

A request begins while something is left and is charged as it is served, so a quota may be overdrawn by what runs at a time;
the debt is waited off before the next request begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from core.config import TenantConfig

BURST_S = 60.0


@dataclass(slots=True)
class _Bucket:
    tokens_per_s: float
    full: float
    left: float
    filled_at: float


class Quotas:
    """Charges of other routers reach the same buckets where routers share them (`router.sharing`)."""

    def __init__(self, tenants: Mapping[str, TenantConfig]) -> None:
        self._buckets: dict[str, _Bucket] = {}
        for name, tenant in tenants.items():
            if tenant.tokens_per_s is not None:
                full = tenant.burst_tokens or BURST_S * tenant.tokens_per_s
                self._buckets[name] = _Bucket(tenant.tokens_per_s, full, full, 0.0)

    def tenants(self) -> list[str]:
        return list(self._buckets)

    def rate(self, tenant: str) -> float | None:
        """Tokens per second; None: no quota."""
        bucket = self._buckets.get(tenant)
        return bucket.tokens_per_s if bucket is not None else None

    def wait_s(self, tenant: str, now: float) -> float:
        """Until the tenant may begin a request; 0: now."""
        bucket = self._filled(tenant, now)
        if bucket is None or bucket.left > 0:
            return 0.0
        return (1.0 - bucket.left) / bucket.tokens_per_s

    def used(self, tenant: str, tokens: float, now: float) -> None:
        bucket = self._filled(tenant, now)
        if bucket is not None:
            bucket.left -= tokens

    def _filled(self, tenant: str, now: float) -> _Bucket | None:
        bucket = self._buckets.get(tenant)
        if bucket is not None and now > bucket.filled_at:
            bucket.left = min(bucket.full, bucket.left + (now - bucket.filled_at) * bucket.tokens_per_s)
            bucket.filled_at = now
        return bucket
