"""A store's metrics, read from its state when they are scraped. Names end in their unit."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import Metric

from core.samples import counter, counters, gauge, gauges
from core.telemetry import histogram_family
from kvtransfer.directory import Tier
from kvtransfer.fetch import FetchStats
from kvtransfer.kv_node import TierStat
from kvtransfer.store_announcer import StoreAnnouncer
from kvtransfer.store_node import StoreNode
from kvtransfer.store_plane import StorePlane
from kvtransfer.store_replicas import Replicas

NOTHING = (TierStat(Tier.DRAM, 0, 0, 0, 0, 0, 0, 0),)  # before there is a block: what is watched has to exist


class StoreMetrics:
    """Of a store node: what it holds, what came in, what was asked for. Lookups are counted by tier: hit ratios follow."""

    def __init__(self, store: StoreNode, announcer: StoreAnnouncer, replicas: Replicas | None = None) -> None:
        self._store = store
        self._replicas = replicas
        self._announcer = announcer

    def collect(self) -> Iterable[Metric]:
        stat, plane = self._store.stat(), self._store.plane
        yield from _tiers(stat.tiers or NOTHING)
        yield from self._offers()
        yield counter("tandem_kv_digest_failures_total", "Blocks that were not what their digest says.", stat.digest_failures)
        yield gauge("tandem_kv_leases", "Leases on KV blocks that are open.", stat.leases_open)
        yield counter("tandem_kv_announced_keys_total", "Keys announced to the directory.", self._announcer.announced)
        yield counter(
            "tandem_kv_directory_failures_total", "Announcements that the directory did not take.", self._announcer.failures
        )
        off = int(plane is not None and bool(plane.disk.off))
        yield gauge("tandem_kv_store_disk_off", "1 when a disk was configured and cannot be used.", off)
        copies = self._replicas
        yield gauge("tandem_kv_replicas", "Copies kept here of blocks of other hosts.", copies.kept if copies else 0)
        made = [(("made",), copies.made if copies else 0), (("given_up",), copies.given_up if copies else 0)]
        yield counters("tandem_kv_replicas_total", "Copies that others took, and those given up here.", ("event",), made)
        yield from _transfers(plane.fetcher.stats if plane is not None else FetchStats())
        if plane is not None:
            yield from _plane(plane)

    def _offers(self) -> Iterable[Metric]:
        stats = self._store.offers.stats
        blocks = [((name,), getattr(stats.blocks, name)) for name in ("taken", "known", "refused")]
        yield counters("tandem_kv_store_offered_blocks_total", "Blocks that workers offered.", ("outcome",), blocks)
        yield counter("tandem_kv_offers_turned_away_total", "Offers refused because too many waited.", stats.turned_away)
        yield gauge("tandem_kv_offers_open", "Offers being carried out or waiting.", len(self._store.offers))
        yield histogram_family("tandem_kv_offer_seconds", "Time of offers that brought blocks.", [(stats.seconds, {})])
        yield histogram_family("tandem_kv_offer_bytes", "Bytes that an offer brought.", [(stats.bytes, {})])


def _tiers(tiers: Iterable[TierStat]) -> Iterable[Metric]:
    rows = [(tier.tier.name.lower(), tier) for tier in tiers]
    yield gauges("tandem_kv_store_blocks", "Blocks by tier.", ("tier",), [((name,), tier.blocks) for name, tier in rows])
    yield gauges("tandem_kv_store_bytes", "Bytes of blocks by tier.", ("tier",), [((name,), tier.bytes) for name, tier in rows])
    lookups = [((name, "hit"), tier.hits) for name, tier in rows] + [((name, "miss"), tier.misses) for name, tier in rows]
    yield counters("tandem_kv_lookups_total", "Keys looked up for holds, by tier.", ("tier", "outcome"), lookups)
    gone = [((name,), tier.evictions) for name, tier in rows]
    yield counters("tandem_kv_evictions_total", "Blocks evicted, by tier.", ("tier",), gone)


def _transfers(stats: FetchStats) -> Iterable[Metric]:
    """Of offered blocks; a worker counts its hand-offs under the same names."""
    moved = [((name,), stats.bytes[name]) for name in sorted(stats.bytes)]
    yield counters("tandem_kv_transferred_bytes_total", "Bytes of KV pulled from workers.", ("transport",), moved)
    yield counters(
        "tandem_kv_transport_fallbacks_total",
        "Pulls that went on over another transport.",
        ("failed", "next"),
        stats.fallbacks.items(),
    )


def _plane(plane: StorePlane) -> Iterable[Metric]:
    counts, exports = plane.inventory.counts(), plane.exports
    states = [((state,), getattr(counts, state)) for state in ("free", "cached", "active")]
    yield gauges("tandem_kv_blocks", "KV blocks by state.", ("state",), states)
    yield gauge("tandem_kv_pinned_blocks", "Blocks that are not evicted.", plane.inventory.pinned())
    idle_s = plane.inventory.evictions.idle_s
    yield histogram_family("tandem_kv_evicted_idle_seconds", "How long evicted blocks had been idle.", [(idle_s, {})])
    yield gauge("tandem_kv_holds_open", "Leases of those who read by key.", exports.holds_open)
    ended = [((state.value,), count) for state, count in sorted(exports.holds_ended.items(), key=lambda row: row[0].value)]
    yield counters("tandem_kv_holds_total", "Leases of those who read by key, by how they ended.", ("state",), ended)
    yield counter("tandem_kv_store_unwritten_blocks_total", "Blocks that never reached the disk.", plane.disk.forgotten)
    if plane.disk.tier is not None:
        yield from plane.disk.tier.collect()
