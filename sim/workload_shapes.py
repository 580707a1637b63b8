"""When requests are due: renewal processes, and rates that change.

All randomness comes from the `random.Random` of the caller: the same seed gives the same times.
"""

from __future__ import annotations

import bisect
import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum

from sim.workload import Arrival, at_times


class Arrivals(Enum):
    POISSON = "poisson"
    CONSTANT = "constant"
    GAMMA = "gamma"


def arrivals(rate: float, kind: Arrivals, cv: float, rng: random.Random) -> Iterator[float]:
    """Seconds at which requests are due, without end, the first at 0. The gaps have mean 1/rate; of `gamma` ones the
    coefficient of variation is `cv`, as ServeGen finds it in production (1 is Poisson, more is burstier)."""
    gap: Callable[[], float]
    if kind is Arrivals.CONSTANT or (kind is Arrivals.GAMMA and cv == 0):
        gap = lambda: 1.0 / rate  # noqa: E731
    elif kind is Arrivals.POISSON:
        gap = lambda: rng.expovariate(rate)  # noqa: E731
    else:
        shape = 1.0 / cv**2
        gap = lambda: rng.gammavariate(shape, 1.0 / (rate * shape))  # noqa: E731
    now = 0.0
    while True:
        yield now
        now += gap()


class RateCurve:
    """A rate that changes: straight lines between points (time in s, requests per second); two points of one time make a step.

    Raises ValueError when times go back, a rate is negative or nothing ever arrives.
    """

    def __init__(self, points: Sequence[tuple[float, float]]) -> None:
        times = [at for at, _ in points]
        if len(points) < 2 or times[0] != 0 or any(b < a for a, b in itertools.pairwise(times)):
            raise ValueError("a rate curve needs two points or more, the first at 0 s, and times that never go back")
        if not all(0 <= rate < math.inf for _, rate in points):
            raise ValueError("a rate is a number of requests per second, 0 or more")
        self._points = points
        areas = ((b - a) * (low + high) / 2 for (a, low), (b, high) in itertools.pairwise(points))
        self._requests = list(itertools.accumulate(areas, initial=0.0))
        if not 0 < self._requests[-1] < math.inf:
            raise ValueError("by this rate curve nothing ever arrives")

    @property
    def requests(self) -> float:
        """How many are expected in all."""
        return self._requests[-1]

    @property
    def duration_s(self) -> float:
        return self._points[-1][0]

    def due(self, unit: Iterable[float]) -> Iterator[float]:
        """Times of a process of rate 1 (`arrivals(1.0, …)`), run on a clock that goes as fast as the curve is high, until its
        end: a Poisson process stays one, with this rate, and the CV of any other one is kept locally."""
        for count in unit:
            if count >= self._requests[-1]:
                return
            yield self._time_of(count)

    def _time_of(self, count: float) -> float:
        """When so many have been expected: the root of a quadratic within one piece."""
        piece = bisect.bisect_right(self._requests, count) - 1
        (start, low), (end, high) = self._points[piece : piece + 2]
        left, slope = count - self._requests[piece], (high - low) / (end - start)
        return min(end, start + 2 * left / (low + math.sqrt(max(0.0, low * low + 2 * slope * left)))) if left > 0 else start


def ramp(first_rate: float, last_rate: float, duration_s: float) -> RateCurve:
    """From one rate to another, evenly."""
    return RateCurve([(0.0, first_rate), (duration_s, last_rate)])


def bursts(rate: float, burst_rate: float, every_s: float, burst_s: float, duration_s: float) -> RateCurve:
    """`rate`, but in the last `burst_s` of every `every_s`, when it is `burst_rate`."""
    if not 0 < burst_s < every_s:
        raise ValueError("a burst is shorter than the time from one to the next")
    points = [(0.0, rate)]
    for number in itertools.count(1):
        end = number * every_s
        points += [(end - burst_s, rate), (end - burst_s, burst_rate), (end, burst_rate), (end, rate)]
        if end >= duration_s:
            return RateCurve(_until(points, duration_s))
    raise AssertionError


def _until(points: list[tuple[float, float]], end_s: float) -> list[tuple[float, float]]:
    """Of a curve of steps."""
    kept = [point for point in points if point[0] < end_s]
    return [*kept, (end_s, kept[-1][1])]


def spread_ticks(requests: Iterable[Arrival], rng: random.Random) -> Iterator[Arrival]:
    """Requests that a coarse clock put at one time, at random ones until its next, in the recorded order. A tick is as long as
    the shortest gap between two times so far, so that a trace with a fine clock hardly changes.

    Mooncake's conversations tick every 3 s: without this a simulated cluster sees a burst at each tick and nothing between.
    """
    tick_s = math.inf
    batch: list[Arrival] = []
    for request in requests:
        if batch and request.arrival_s > batch[0].arrival_s:
            tick_s = min(tick_s, request.arrival_s - batch[0].arrival_s)
            yield from _spread(batch, tick_s, rng)
            batch = []
        batch.append(request)
    yield from _spread(batch, tick_s if tick_s < math.inf else 0.0, rng)


def _spread(batch: list[Arrival], tick_s: float, rng: random.Random) -> Iterator[Arrival]:
    if len(batch) < 2:
        return iter(batch)
    start_s = batch[0].arrival_s
    return at_times(batch, sorted(start_s + tick_s * rng.random() for _ in batch))
