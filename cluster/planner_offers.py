"""What a plan is made of: kinds of replicas that can be had, their prices, and pools of them. Deciding code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cluster.planner_model import Arriving, Layout
from core.cost_model import CostModel, LinkCost
from core.errors import ConfigError
from core.request import WorkerRole

SAMPLE_MAX = 1000
HOUR_S = 3600.0
Floats = npt.NDArray[np.float64]


class Market(Enum):
    ON_DEMAND = "on_demand"
    SPOT = "spot"


@dataclass(frozen=True, slots=True)
class Terms:
    """Of one GPU in one market. `gpus_max` None: as many as wanted. Spot capacity is taken away `interruptions_per_hour` times
    an hour and instance, `notice_s` after its announcement, and is back `away_s` later."""

    usd_per_hour: float
    gpus_max: int | None = None
    interruptions_per_hour: float = 0.0
    notice_s: float = 0.0
    away_s: float = 0.0

    @property
    def availability(self) -> float:
        """Share of time that a replica is there."""
        return 1 / (1 + self.interruptions_per_hour * self.away_s / HOUR_S)


@dataclass(frozen=True, eq=False, slots=True)
class Offer:
    """One kind of replica: a GPU type in one layout. `kv_tokens`: what a replica holds beside its weights; `link`: its network.

    `step_tokens`: tokens of one step when it computes prompts, the chunk size of chunked prefill.
    """

    gpu: str
    layout: Layout
    cost: CostModel
    kv_tokens: int
    link: LinkCost
    on_demand: Terms | None
    spot: Terms | None = None
    step_tokens: int = 2048

    def terms(self, market: Market) -> Terms | None:
        return self.on_demand if market is Market.ON_DEMAND else self.spot

    def __str__(self) -> str:
        return f"{self.gpu} tp {self.layout.tp}" + (f" pp {self.layout.pp}" if self.layout.pp > 1 else "")


@dataclass(frozen=True, slots=True)
class Pool:
    role: WorkerRole
    offer: Offer
    replicas: int
    market: Market = Market.ON_DEMAND

    @property
    def gpus(self) -> int:
        return self.replicas * self.offer.layout.gpus

    @property
    def terms(self) -> Terms:
        terms = self.offer.terms(self.market)
        assert terms is not None, "a pool is of replicas that can be had"
        return terms

    @property
    def usd_per_hour(self) -> float:
        return self.gpus * self.terms.usd_per_hour

    def to_json(self) -> dict[str, Any]:
        return {
            "role": self.role.value,
            "gpu": self.offer.gpu,
            "tp": self.offer.layout.tp,
            "pp": self.offer.layout.pp,
            "replicas": self.replicas,
            "market": self.market.value,
            "step_tokens": self.offer.step_tokens,
            "usd_per_hour": self.usd_per_hour,
        }


Pools = tuple[Pool, ...]


def gpus_of(pools: Sequence[Pool]) -> int:
    return sum(pool.gpus for pool in pools)


def usd_per_hour_of(pools: Sequence[Pool]) -> float:
    return sum(pool.usd_per_hour for pool in pools)


def shortage(pools: Sequence[Pool]) -> str:
    """Which GPU there are too few of for these pools; an empty text when they can be had."""
    wanted: dict[tuple[str, Market], int] = {}
    for pool in pools:
        wanted[pool.offer.gpu, pool.market] = wanted.get((pool.offer.gpu, pool.market), 0) + pool.gpus
        most = pool.terms.gpus_max
        if most is not None and wanted[pool.offer.gpu, pool.market] > most:
            return f"{pool.offer.gpu} ({pool.market.value.replace('_', ' ')}): {most} GPUs can be had"
    return ""


class Attainment(NamedTuple):
    """Shares of requests that met their limits; `joint`: both. `held`: were not short of memory."""

    joint: float
    ttft: float
    tbt: float
    held: float = 1.0

    @property
    def worst(self) -> str:
        shares = {"memory": self.held, "tbt": self.tbt, "ttft": self.ttft}
        return min(shares, key=lambda name: shares[name])


@dataclass(frozen=True, eq=False)
class Workload:
    """Lengths of requests, evenly thinned to a bounded number, how many come, and how unevenly.

    `cv2`: squared coefficient of variation of the gaps between arrivals, 1 for a Poisson process.
    """

    inputs: Floats
    outputs: Floats
    rate_rps: float
    cv2: float

    @property
    def mean_output(self) -> float:
        return float(np.mean(self.outputs))

    @staticmethod
    def of(requests: Sequence[Arriving]) -> Workload:
        """Raises ConfigError for fewer than two requests, or all at once."""
        span_s = requests[-1].arrival_s - requests[0].arrival_s if requests else 0.0
        if len(requests) < 2 or span_s <= 0:
            raise ConfigError(f"a plan needs a trace of two requests or more at different times, got {len(requests)}")
        gaps = np.diff([request.arrival_s for request in requests])
        cv2 = float(np.var(gaps) / np.mean(gaps) ** 2)
        kept = requests[:: -(-len(requests) // SAMPLE_MAX)]
        return Workload(
            np.array([request.input_tokens for request in kept], dtype=np.float64),
            np.array([request.output_tokens for request in kept], dtype=np.float64),
            (len(requests) - 1) / span_s,
            cv2,
        )
