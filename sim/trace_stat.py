"""What a workload is like, in figures: `tandem trace stat`."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate, repeat
from typing import Any, overload

from core.errors import ConfigError
from core.latency import percentile
from sim.cache_oracle import LruOracle
from sim.traces import read_trace, trace_format
from sim.workload import Arrival

CAPACITIES_BLOCKS = (1_000, 5_859, 10_000, 30_000, 50_000)
"""Of 512 tokens; 5,859 of them hold three million, the DRAM of one of Mooncake's nodes."""
BINS_S = (1, 10, 60)
PERCENTS = (50, 90, 99)


def stat_of(path: str) -> dict[str, Any]:
    """The figures of a trace file, as `tandem trace stat --json` prints them; what the file does not tell is None.

    Reads it as a stream. Raises ConfigError as `sim.traces.read_trace` does, and when the file has no requests.
    """
    format = trace_format(path)
    stat = TraceStat()
    due = repeat(0.0) if format.untimed else None
    stat.add_all(read_trace(path, due=due, output_tokens=1 if format.outputless else None))
    figures = stat.figures()
    if not figures["requests"]:
        raise ConfigError(f"{path} has no requests")
    for name in ("span_s", "rate_rps", "arrival_cv", "dispersion", "busiest_minute") if format.untimed else ():
        figures[name] = None
    if format.outputless:
        figures["output_tokens"] = dict.fromkeys(figures["output_tokens"])
    return {"format": format.name, **figures}


class TraceStat:
    """Figures of the requests it saw. Memory grows with the different lengths, tenants, sessions and blocks alone."""

    def __init__(self) -> None:
        self._requests = 0
        self._first_s = self._last_s = 0.0
        self._gaps = _Moments()
        self._bins = {width_s: _Bins(width_s) for width_s in BINS_S}
        self._inputs: Counter[int] = Counter()
        self._outputs: Counter[int] = Counter()
        self._tenants: set[str] = set()
        self._sessions: set[tuple[str, str]] = set()
        self._lru = LruOracle(CAPACITIES_BLOCKS)

    def add_all(self, arrivals: Iterable[Arrival]) -> None:
        for a in arrivals:
            self.add(a)

    def add(self, a: Arrival) -> None:
        """The next one in time."""
        if self._requests:
            self._gaps.add(a.arrival_s - self._last_s)
        else:
            self._first_s = a.arrival_s
        self._requests += 1
        self._last_s = a.arrival_s
        for bins in self._bins.values():
            bins.add(a.arrival_s - self._first_s)
        self._inputs[a.input_tokens] += 1
        self._outputs[a.output_tokens] += 1
        self._tenants.add(a.tenant)
        if a.session:
            self._sessions.add((a.tenant, a.session))
        if a.blocks:
            self._lru.add(a.blocks)

    def figures(self) -> dict[str, Any]:
        """`span_s`: first to last arrival. `rate_rps`: requests by that. `arrival_cv`: of the gaps. `dispersion`: variance over
        mean of the arrivals in bins of 1, 10 and 60 s (1 for Poisson). `busiest_minute`: the fullest 60 s over the mean ones.
        `lru_hit_ratio`: by the cache's capacity in blocks, of traces that name blocks. None: there is no such figure."""
        span_s = self._last_s - self._first_s
        figures: dict[str, Any] = {
            "requests": self._requests,
            "span_s": span_s if self._requests else None,
            "rate_rps": self._requests / span_s if span_s > 0 else None,
            "arrival_cv": self._gaps.cv,
            "input_tokens": _lengths(self._inputs),
            "output_tokens": _lengths(self._outputs),
            "dispersion": {str(width_s): bins.dispersion for width_s, bins in self._bins.items()},
            "busiest_minute": self._bins[60].fullest_over_mean,
            "tenants": len(self._tenants),
            "sessions": len(self._sessions),
        }
        if self._lru.blocks:
            figures |= {"blocks": self._lru.blocks, "blocks_distinct": self._lru.distinct}
            figures["lru_hit_ratio"] = self._lru.hit_ratio()
        return figures


class _Moments:
    """Mean and variance in one pass (Welford)."""

    def __init__(self) -> None:
        self._count, self._mean, self._squares = 0, 0.0, 0.0

    def add(self, value: float) -> None:
        self._count += 1
        off = value - self._mean
        self._mean += off / self._count
        self._squares += off * (value - self._mean)

    @property
    def cv(self) -> float | None:
        """Standard deviation over mean."""
        return math.sqrt(self._squares / self._count) / self._mean if self._mean > 0 else None


class _Bins:
    """Arrivals counted in bins of `width_s` from the first one on, empty ones included; not the last one, which is not over."""

    def __init__(self, width_s: int) -> None:
        self._width_s = width_s
        self._bin = self._count = self._before = self._squares = self._fullest = 0

    def add(self, at_s: float) -> None:
        bin = int(at_s // self._width_s)
        if bin != self._bin:
            self._before += self._count
            self._squares += self._count**2
            self._fullest = max(self._fullest, self._count)
            self._bin, self._count = bin, 0
        self._count += 1

    @property
    def dispersion(self) -> float | None:
        """Variance over mean."""
        mean = self._before / self._bin if self._bin else 0.0
        return self._squares / self._bin / mean - mean if mean else None

    @property
    def fullest_over_mean(self) -> float | None:
        return self._fullest * self._bin / self._before if self._before else None


class _Counted(Sequence[float]):
    """Sorted values, each as often as it was counted, without a list of them."""

    def __init__(self, counts: Counter[int]) -> None:
        self._values = sorted(counts)
        self._ends = list(accumulate(counts[value] for value in self._values))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, place: int) -> float: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[float]: ...
    def __getitem__(self, place: int | slice) -> float | Sequence[float]:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        if not 0 <= place < len(self):
            raise IndexError(place)
        return self._values[bisect_right(self._ends, place)]


def _lengths(counts: Counter[int]) -> dict[str, float | None]:
    ordered = _Counted(counts)
    if not ordered:
        return {"mean": None, **{f"p{percent}": None for percent in PERCENTS}}
    mean = sum(value * count for value, count in counts.items()) / len(ordered)
    return {"mean": mean, **{f"p{percent}": percentile(ordered, percent) for percent in PERCENTS}}
