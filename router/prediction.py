"""Predicted against actual: how far off the router's predictions were, per policy. Deciding code."""

from __future__ import annotations

from core.histogram import Histogram
from router.decisions import Explanation

ERROR_RATIOS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0, 5.0)


class PredictionErrors:
    """Histograms of |predicted − actual| / actual by policy, of choices that completed where they were first placed."""

    def __init__(self) -> None:
        self.ttft: dict[str, Histogram] = {}
        self.tpot: dict[str, Histogram] = {}

    def ended(self, known: Explanation) -> None:
        _observe(self.ttft, known.policy, known.ttft_error)
        _observe(self.tpot, known.policy, known.tpot_error)


def _observe(table: dict[str, Histogram], policy: str, error: float | None) -> None:
    if error is not None:
        table.setdefault(policy, Histogram(ERROR_RATIOS)).observe(error)
