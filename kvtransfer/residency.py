"""Which missing blocks to fetch, from whom, and where to stop because computing them is quicker. Deciding code.

A prompt starts when the last block of its fetched prefix is here, so what is planned is the prefix that makes
`time of fetching it + time of computing the rest` shortest. (Mooncake, FAST '25, §5.2, decides so between instances;
here the unit is the block and several sources serve one prompt side by side.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from core.blocks import BlockKey, KvLayout
from kvtransfer.directory import Holder, Located, NodeRecord, Tier


class LinkCost(NamedTuple):
    """What fetching from one (node, tier) takes: `latency_s` until the first byte moves, then `bytes_per_s`."""

    latency_s: float
    bytes_per_s: float


class Here(NamedTuple):
    """Who wants the blocks."""

    worker_id: str
    host_id: str
    layout: KvLayout


@dataclass(frozen=True, slots=True)
class Prices:
    """`link` prices a (holder, same host) pair; `compute_block_s` is what computing one block here takes, `inf` to fetch
    whatever can be had. Nothing is planned that would take longer than `time_left_s`."""

    link: Callable[[Holder, bool], LinkCost]
    compute_block_s: float
    time_left_s: float


class Share(NamedTuple):
    """What one (node, tier) is asked for: places in the list of missing keys, ascending."""

    holder: Holder
    places: tuple[int, ...]


def plan(
    missing: Sequence[BlockKey],
    located: Located,
    here: Here,
    prices: Prices,
) -> list[Share]:
    """Shares that together cover a prefix of `missing`, each place once; none when computing all of it is quickest.

    `located.holders[i]` says who may have `missing[i]`; a node whose layout differs is not asked, nor this one. Every
    block goes to the source that would have it here first; sources of one host share the link to it, a node's disk is a
    link of its own. A draw keeps to the source of the block before, then goes to the same host, DRAM before disk.
    """
    lanes: dict[_Lane, float] = {}  # when each is free again
    chosen: list[Holder] = []
    taken_s = best_s = 0.0
    best = 0
    usable = _Usable(located.nodes, here)
    for holders in located.holders[: len(missing)]:
        offers = [_offer(holder, usable, here, prices, lanes) for holder in holders if usable(holder)]
        if not offers:
            break
        previous = chosen[-1] if chosen else None
        offer = min(offers, key=lambda o: (o.done_s, o.holder != previous, o.rank, o.holder))
        lanes[offer.lane] = offer.done_s
        taken_s = max(taken_s, offer.done_s)
        if taken_s > prices.time_left_s:
            break
        chosen.append(offer.holder)
        gained_s = len(chosen) * prices.compute_block_s - taken_s
        if gained_s > 0 and gained_s >= best_s:  # `>=`: with `inf` everything is fetched
            best, best_s = len(chosen), gained_s
    return _shares(chosen[:best])


class _Lane(NamedTuple):
    host_id: str
    disk_of: str  # the node, where the blocks come from its disk


class _Offer(NamedTuple):
    done_s: float
    rank: tuple[bool, Tier]
    holder: Holder
    lane: _Lane


class _Usable:
    """Whether a holder is a node we may ask, looked up once per holder."""

    def __init__(self, nodes: Mapping[str, NodeRecord], here: Here) -> None:
        self._nodes = nodes
        self._here = here
        self._known: dict[Holder, bool] = {}

    def __call__(self, holder: Holder) -> bool:
        known = self._known.get(holder)
        if known is None:
            known = self._known[holder] = self._check(holder)
        return known

    def host_of(self, holder: Holder) -> str:
        return self._nodes[holder.worker_id].source.host_id

    def _check(self, holder: Holder) -> bool:
        record = self._nodes.get(holder.worker_id)
        if record is None or holder.worker_id == self._here.worker_id or record.source.epoch != holder.epoch:
            return False
        return record.layout is not None and self._here.layout.mismatch(record.layout) is None


def _offer(holder: Holder, usable: _Usable, here: Here, prices: Prices, lanes: Mapping[_Lane, float]) -> _Offer:
    host_id = usable.host_of(holder)
    near = host_id == here.host_id
    cost = prices.link(holder, near)
    lane = _Lane(host_id, holder.worker_id if holder.tier is Tier.DISK else "")
    done_s = max(lanes.get(lane, 0.0), cost.latency_s) + here.layout.block_bytes / cost.bytes_per_s
    return _Offer(done_s, (not near, holder.tier), holder, lane)


def _shares(chosen: Sequence[Holder]) -> list[Share]:
    places: dict[Holder, list[int]] = {}
    for place, holder in enumerate(chosen):
        places.setdefault(holder, []).append(place)
    return [Share(holder, tuple(taken)) for holder, taken in places.items()]
