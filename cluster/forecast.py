"""What a load will be in a while: level and damped trend, and how far above it may come. Deciding code.

Holt's linear method with Gardner and McKenzie's damped trend (Management Science, 1985), for samples at uneven times: no
season is assumed, a trend dies out over the horizon. The head-room is a quantile of by how much the last forecasts fell short.
"""

from __future__ import annotations

import math
from collections import deque

LEVEL_OVER_S = 10.0
TREND_OVER_S = 30.0
DAMPED_OVER_S = 60.0
"""After so long a trend counts a third: what rises does not rise for ever."""
ERRORS_KEPT = 60


class Forecast:
    """Of one series that is never negative: requests or tokens per second, a mean length, workers kept busy."""

    def __init__(self) -> None:
        self.level = 0.0
        self.trend_per_s = 0.0
        self._at: float | None = None
        self._missed: deque[float] = deque(maxlen=ERRORS_KEPT)

    def observe(self, value: float, now: float) -> None:
        """Times must not decrease; a second sample at one time replaces nothing and is left out."""
        if self._at is None:
            self.level, self._at = value, now
            return
        passed_s = now - self._at
        if passed_s <= 0:
            return
        expected = self.ahead(passed_s)
        self._missed.append(value - expected)
        before = self.level
        self.level = expected + _share(passed_s, LEVEL_OVER_S) * (value - expected)
        carried = self.trend_per_s * math.exp(-passed_s / DAMPED_OVER_S)
        self.trend_per_s = carried + _share(passed_s, TREND_OVER_S) * ((self.level - before) / passed_s - carried)
        self._at = now

    def ahead(self, horizon_s: float) -> float:
        """The value expected `horizon_s` after the last sample."""
        grown_s = DAMPED_OVER_S * (1 - math.exp(-horizon_s / DAMPED_OVER_S))
        return max(0.0, self.level + self.trend_per_s * grown_s)

    def upper(self, horizon_s: float, quantile: float = 0.9) -> float:
        """What is not passed with that probability, if forecasts go on missing as they did."""
        if not self._missed:
            return self.ahead(horizon_s)
        missed = sorted(self._missed)
        short = missed[min(len(missed) - 1, math.floor(quantile * len(missed)))]
        return self.ahead(horizon_s) + max(0.0, short)


def _share(passed_s: float, over_s: float) -> float:
    return 1 - math.exp(-passed_s / over_s)
