"""Hit ratios of block caches by capacity on Mooncake's traces, and how fast traces are read.

Claims (issue "The simulator and the planner"): the least recently used cache of so many 512-token blocks finds the published
share of each trace's blocks, to four digits. The published figures are of the first 2,400 s of the conversation trace and the
first 650 s of the synthetic one, and of the whole traces; another part has no published figure, and is stated. Beside them what
the shipped table of blocks finds with each of its eviction policies (of which `cost` spares seconds of computing, not blocks),
and how many requests a second the reader yields.

Without --data the conversation trace's first 300 requests, which are copied into the tests, are all there is.

    python -m benchmarks.simulator_cache [--quick] [--data DIR] [--json FILE]
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.rows import Row, arguments, report
from core.eviction import POLICIES
from sim.cache_oracle import InventoryCache, LruOracle
from sim.trace_stat import CAPACITIES_BLOCKS
from sim.traces import read_trace, trace_format
from sim.workload import Arrival

EXCERPT = Path(__file__).parent.parent / "tests/sim/data/mooncake_conversation_300.jsonl.gz"
TRACES = ("mooncake_conversation.jsonl.gz", "mooncake_synthetic.jsonl")
PUBLISHED = {
    ("mooncake_conversation", 7_851): (0.0441, 0.1346, 0.2058, 0.3179, 0.3454, 0.3509),
    ("mooncake_conversation", 12_031): (0.0445, 0.1355, 0.2112, 0.3257, 0.3546, 0.3664),
    ("mooncake_synthetic", 2_477): (0.0186, 0.1277, 0.1973, 0.3845, 0.3991, 0.3991),
    ("mooncake_synthetic", 3_993): (0.0825, 0.3094, 0.4235, 0.6242, 0.6396, 0.6396),
}
"""By trace and number of its requests: the hit ratio at each of CAPACITIES_BLOCKS, and without bound."""
SIZES = ("1000", "5859", "10000", "30000", "50000", "unbounded")
READ = ("servegen/m-large_sampled_20min.csv.gz", "servegen/deepseek-r1_sampled_21h-23h.csv.gz", "azure2023_conv.csv")
PEER = "the published table, one LRU cache of 512-token blocks"


def cache_rows(path: Path, quick: bool) -> Iterator[Row]:
    name = path.name.partition(".")[0]
    trace = list(read_trace(str(path)))
    oracle = LruOracle(CAPACITIES_BLOCKS)
    for arrival in trace:
        oracle.add(arrival.blocks)
    found = oracle.hit_ratio()
    published = PUBLISHED.get((name, len(trace)))
    how = f"{len(trace):,} requests, {oracle.blocks:,} blocks in file order"
    if published:
        worst = max(abs(found[size] - bar) for size, bar in zip(SIZES, published, strict=True))
        claim = f"{name}: largest distance from a published hit ratio"
        yield Row(f"cache.{name}.error", claim, round(worst, 4), "", 0.0, "<=", PEER, how)
    for place, size in enumerate(SIZES):
        bar = published[place] if published else None
        yield Row(f"cache.{name}.lru.{size}", f"{name}: LRU of {size} blocks", found[size], "", bar, ">=", PEER, how)
    for policy in POLICIES:
        for capacity in CAPACITIES_BLOCKS[1::2] if quick else CAPACITIES_BLOCKS:
            yield inventory_row(name, trace, policy, capacity, found[str(capacity)])


def inventory_row(name: str, trace: list[Arrival], policy: str, capacity: int, lru: float) -> Row:
    cache = InventoryCache(capacity, policy)
    for arrival in trace:
        cache.add(arrival)
    claim = f"{name}: core.inventory, policy {policy}, of {capacity} blocks"
    how = "leading blocks only, let go last first, which plain LRU does not"
    return Row(f"cache.{name}.{policy}.{capacity}", claim, round(cache.hit_ratio, 4), "", None, ">=", f"LRU: {lru:.4f}", how)


def reading_row(path: Path, repeats: int) -> Row:
    best = 0.0
    for _ in range(repeats):
        started = time.perf_counter()
        count = sum(1 for _ in read_trace(str(path)))
        best = max(best, count / (time.perf_counter() - started))
    name = path.name.partition(".")[0]
    claim = f"{name}: requests that the reader yields a second"
    how = f"{count:,} rows of {trace_format(str(path)).name} format, best of {repeats}"
    return Row(f"trace.read.{name}", claim, round(best), "1/s", None, ">=", "", how)


def main() -> None:
    options = arguments(__doc__).parse_args()
    folder: Path | None = options.data / "traces" if options.data else None
    recorded = [folder / name for name in TRACES] if folder else [EXCERPT]
    large = [folder / name for name in READ] if folder else []
    rows = [row for path in recorded if path.exists() for row in cache_rows(path, options.quick)]
    rows += [reading_row(path, 1 if options.quick else 3) for path in large if path.exists()]
    if not rows:
        raise SystemExit(f"there is none of {', '.join(TRACES)} in {folder}")
    report(rows, options.json)


if __name__ == "__main__":
    main()
