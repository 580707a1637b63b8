"""Metrics of a worker's share of the KV plane, read from its plain numbers when they are scraped."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import Metric

from core.samples import counter, counters, gauge
from core.telemetry import histogram_family
from kvtransfer.announcer import Announcer
from kvtransfer.fetch import FetchStats
from kvtransfer.flight import ResidentStats
from kvtransfer.offerer import Offerer
from kvtransfer.resident import Resident


def collect(
    fetched: FetchStats, resident: Resident | None, announcer: Announcer | None, offerer: Offerer | None
) -> Iterable[Metric]:
    yield from _fetched(fetched)
    if resident is not None:
        yield from _resident(resident.stats)
    if announcer is not None:
        failures = announcer.failures + (resident.stats.directory_failures if resident is not None else 0)
        yield counter("tandem_kv_announced_keys_total", "Keys announced to the directory.", announcer.announced)
        yield counter("tandem_kv_directory_failures_total", "Calls that the directory did not answer.", failures)
    if offerer is not None:
        yield from _offered(offerer)


def _fetched(stats: FetchStats) -> Iterable[Metric]:
    by_name = [((name,), count) for name, count in stats.bytes.items()]
    yield counters("tandem_kv_transferred_bytes_total", "Bytes moved, by transport.", ("transport",), by_name)
    yield counters(
        "tandem_kv_transport_fallbacks_total",
        "Pulls that went on over another transport.",
        ("failed", "next"),
        stats.fallbacks.items(),
    )
    how = ("transport", "codec")
    blocks, size = stats.encoded_blocks.items(), stats.encoded_bytes.items()
    yield counters("tandem_kv_encoded_blocks_total", "Blocks that crossed a network through a codec.", how, blocks)
    yield counters("tandem_kv_encoded_bytes_total", "What crossed it of those.", how, size)
    damaged = [((codec,), count) for codec, count in stats.damaged.items()]
    yield counters("tandem_kv_damaged_encodings_total", "Pulls repeated raw, by codec.", ("codec",), damaged)
    yield counter(
        "tandem_kv_digest_failures_total", "Pulls whose blocks were not what their digest says.", stats.digest_failures
    )


def _resident(stats: ResidentStats) -> Iterable[Metric]:
    where = ("source", "tier")
    yield counter("tandem_kv_prompts_total", "Prompts whose blocks were looked for on other nodes.", stats.asked)
    yield counters("tandem_kv_found_blocks_total", "Blocks of those prompts, by where they were.", where, stats.blocks.items())
    yield counter("tandem_kv_missed_blocks_total", "Blocks of those prompts that had to be computed.", stats.misses)
    yield counters("tandem_kv_fetched_bytes_total", "Bytes fetched for prompts.", where, stats.bytes.items())
    yield histogram_family("tandem_kv_fetch_seconds", "How long prompts waited for blocks of others.", [(stats.seconds, {})])
    failures = [((code,), count) for code, count in stats.failures.items()]
    yield counters("tandem_kv_fetch_failures_total", "Sources that gave less than promised.", ("code",), failures)
    yield counter("tandem_kv_fetch_timeouts_total", "Prompts that waited as long as they may.", stats.timeouts)
    yield counter("tandem_kv_fetch_short_of_memory_total", "Fetches cut short for want of memory.", stats.short_of_memory)


def _offered(offerer: Offerer) -> Iterable[Metric]:
    names = ("taken", "known", "refused", "gone", "forgotten")
    blocks = [((name,), getattr(offerer.stats, name)) for name in names]
    yield counters("tandem_kv_offered_blocks_total", "Blocks offered to a store.", ("outcome",), blocks)
    yield counter("tandem_kv_offer_failures_total", "Offers that no store answered.", offerer.stats.failures)
    yield gauge("tandem_kv_offers_waiting", "Blocks that wait to be offered.", len(offerer))
