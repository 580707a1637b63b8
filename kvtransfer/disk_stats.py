"""What a disk tier has done, as plain numbers; a collector turns them into samples when it is scraped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from core.telemetry import Histogram, histogram_family
from kvtransfer.disk_index import Record

AGE_SECONDS = (1.0, 10.0, 60.0, 600.0, 3600.0, 6 * 3600.0, 86400.0, 7 * 86400.0, 30 * 86400.0)
IO_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0)


@dataclass(slots=True)
class DiskStats:
    """Counters only grow."""

    put_blocks: int = 0  # written and findable
    put_bytes: int = 0
    put_known: int = 0  # were there already, or on their way
    put_queue_full: int = 0  # dropped: the writer was behind
    put_off: int = 0  # refused: writes are off, or the tier is closed
    get_hits: int = 0
    get_misses: int = 0
    get_bytes: int = 0
    corrupt_blocks: int = 0  # dropped: read with another digest than written
    read_errors: int = 0  # dropped: could not be read
    write_errors: int = 0  # 1 once writes are off
    dropped_blocks: int = 0  # with their segment, for want of room
    dropped_segments: int = 0
    kept_blocks: int = 0  # copied out of a segment before it was dropped
    evicted_blocks: int = 0  # on request
    write_seconds: Histogram = field(default_factory=lambda: Histogram(IO_SECONDS))
    read_seconds: Histogram = field(default_factory=lambda: Histogram(IO_SECONDS))
    dropped_age_s: Histogram = field(default_factory=lambda: Histogram(AGE_SECONDS))

    def note_dropped(self, records: Sequence[Record], now_s: float) -> None:
        self.dropped_segments += 1
        self.dropped_blocks += len(records)
        for record in records:
            self.dropped_age_s.observe(max(0.0, now_s - record.written_s))


_COUNTERS = (
    ("put_blocks", "Blocks written"),
    ("put_bytes", "Bytes of blocks written"),
    ("put_queue_full", "Blocks not written because the writer was behind"),
    ("put_off", "Blocks not written because writes are off"),
    ("get_hits", "Blocks read"),
    ("get_misses", "Blocks asked for that could not be served"),
    ("get_bytes", "Bytes of blocks read"),
    ("corrupt_blocks", "Blocks dropped because their digest did not match"),
    ("read_errors", "Blocks dropped because they could not be read"),
    ("dropped_blocks", "Blocks dropped with their segment for want of room"),
    ("kept_blocks", "Blocks copied out of a segment before it was dropped"),
    ("evicted_blocks", "Blocks evicted on request"),
)


def disk_metrics(stats: DiskStats, *, blocks: int, disk_bytes: int, writes_off: bool) -> Iterable[Metric]:
    for name, text in _COUNTERS:
        yield CounterMetricFamily(f"tandem_kv_disk_{name}", text, value=getattr(stats, name))
    yield GaugeMetricFamily("tandem_kv_disk_blocks", "Blocks on disk", value=blocks)
    yield GaugeMetricFamily("tandem_kv_disk_bytes", "Bytes of segment files", value=disk_bytes)
    yield GaugeMetricFamily("tandem_kv_disk_writes_off", "1 when the tier stopped writing", value=int(writes_off))
    yield histogram_family("tandem_kv_disk_write_seconds", "Time of a batch of writes", [(stats.write_seconds, {})])
    yield histogram_family("tandem_kv_disk_read_seconds", "Time of a get", [(stats.read_seconds, {})])
    yield histogram_family(
        "tandem_kv_disk_dropped_age_seconds", "Age of blocks dropped for want of room", [(stats.dropped_age_s, {})]
    )
