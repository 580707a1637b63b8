"""What fetching from other nodes has taken lately, and what is assumed of those nobody fetched from. Deciding code."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from kvtransfer.directory import Holder, Tier
from kvtransfer.residency import LinkCost

ASSUMED = {
    (True, Tier.DRAM): LinkCost(0.001, 4e9),
    (True, Tier.DISK): LinkCost(0.003, 1e9),
    (False, Tier.DRAM): LinkCost(0.002, 1e9),
    (False, Tier.DISK): LinkCost(0.004, 0.5e9),
}
"""By (same host, tier): modest figures of a machine with shared memory, a 10 Gbit/s link and an NVMe disk."""
WEIGHT = 0.3  # of the newest figure
RATE_BYTES_MIN = 2**20  # smaller fetches say something of the latency, nothing of the rate
FORGET_S = 60.0
"""A link found slow is not chosen and so never measured again: after a while it gets its next chance."""
LINKS_MAX = 1024


@dataclass(slots=True)
class _Measured:
    cost: LinkCost
    at: float


class LinkCosts:
    """Exponentially weighted means by (node, tier); a new epoch of a node starts as the old one ended."""

    def __init__(self) -> None:
        self._links: OrderedDict[tuple[str, Tier], _Measured] = OrderedDict()  # measured last at the end

    def cost(self, holder: Holder, near: bool, now: float) -> LinkCost:
        measured = self._links.get((holder.worker_id, holder.tier))
        if measured is None or now - measured.at > FORGET_S:
            return ASSUMED[near, holder.tier]
        return measured.cost

    def observe(self, holder: Holder, near: bool, now: float, latency_s: float, num_bytes: int, transfer_s: float) -> None:
        """One fetch: `latency_s` until bytes began to move, then `num_bytes` of them within `transfer_s`."""
        before = self.cost(holder, near, now)
        rate = before.bytes_per_s
        if num_bytes >= RATE_BYTES_MIN and transfer_s > 0:
            rate += WEIGHT * (num_bytes / transfer_s - rate)
        cost = LinkCost(before.latency_s + WEIGHT * (latency_s - before.latency_s), rate)
        self._links[holder.worker_id, holder.tier] = _Measured(cost, now)
        self._links.move_to_end((holder.worker_id, holder.tier))
        while len(self._links) > LINKS_MAX:
            self._links.popitem(last=False)
