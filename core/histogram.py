"""Counts by size, kept by whoever measures and read by whoever reports."""

from __future__ import annotations

import bisect
from collections.abc import Sequence


class Histogram:
    """Counts by upper bound. One thread observes, any thread may read: a reader is at most one observation behind."""

    def __init__(self, bounds: Sequence[float]) -> None:
        assert list(bounds) == sorted(set(bounds)), "bounds ascend"
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        return sum(self.counts)

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative counts in Prometheus' form, the last one for `+Inf`."""
        total = 0.0
        rows = []
        for bound, count in zip((*self.bounds, float("inf")), tuple(self.counts), strict=True):
            total += count
            rows.append(("+Inf" if bound == float("inf") else repr(float(bound)), total))
        return rows
