"""When requests are due."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from enum import Enum


class Arrivals(Enum):
    POISSON = "poisson"
    CONSTANT = "constant"
    GAMMA = "gamma"


def arrivals(rate: float, kind: Arrivals, cv: float, rng: random.Random) -> Iterator[float]:
    """Seconds at which requests are due, without end. The gaps have mean 1/rate; of `gamma` ones the coefficient of
    variation is `cv`, as ServeGen finds it in production (1 is Poisson, more is burstier)."""
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
