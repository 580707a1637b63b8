"""Judges pools by simulation: the shipped router and schedulers, a part of the trace, the profiles of the offers."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.planner_offers import HOUR_S, Attainment, Market, Offer, Pool, Pools
from core.config import Config
from core.cost_file import write_cost_model
from core.request import Slo, WorkerRole
from sim.faults import Fault
from sim.mischief import Mischief
from sim.run import simulate
from sim.workload import Arrival
from sim.world import World

REQUESTS_MIN, REQUESTS_MAX = 200, 20_000
RUNNING_MAX = 1024
BLOCK_TOKENS = (16, 32, 64, 128)
BLOCKS_A_REQUEST = 64
"""At least, in the mean: the last one of a request is half empty, which is less than 1 %."""


class Simulated:
    """`window_s`: of the demand, in virtual time; another part of the trace for every seed. `folder` keeps the profiles.

    What a replica's memory cannot hold is left out of the simulation and counted as missed.
    """

    def __init__(
        self, arrivals: Sequence[Arrival], rate_rps: float, window_s: float, slo: Slo, policy: str, folder: Path
    ) -> None:
        self.on_progress: Callable[[], None] = lambda: None
        self._arrivals = arrivals
        self._count = min(len(arrivals), max(REQUESTS_MIN, min(REQUESTS_MAX, round(rate_rps * window_s))))
        self._block_tokens = _block_tokens(arrivals)
        self._slo = slo
        self._policy = policy
        self._folder = folder
        self._profiles: dict[Offer, str] = {}

    def __call__(self, pools: Pools, rate_rps: float, seed: int) -> Attainment:
        config = Config.model_validate(self._tree(pools))
        block = config.engine.block_size
        room = min(pool.offer.kv_tokens for pool in pools if pool.role is not WorkerRole.PREFILL) // block * block
        room = min(room, *(pool.offer.kv_tokens for pool in pools))
        asked = self._part(rate_rps, seed)
        fitting = [one for one in asked if one.input_tokens + one.output_tokens + block <= room]
        if not fitting:
            return Attainment(0.0, 0.0, 0.0, 0.0)
        faults = self._faults(pools, fitting[-1].arrival_s, seed)
        report = simulate(
            config,
            fitting,
            self._policy,
            seed,
            prepare=lambda world: _prepare(world, faults),
            on_look=lambda world: self.on_progress(),
        ).report
        share, met = len(fitting) / len(asked), report["attainment"]
        held = share * (1 - report["rejected"] / max(1, report["requests"]))
        return Attainment(share * met["joint"], share * met["ttft"], share * met["tbt"], held)

    def _part(self, rate_rps: float, seed: int) -> list[Arrival]:
        """Consecutive requests, their gaps stretched alike to the rate, so that bursts keep their structure."""
        first = random.Random(f"part {seed}").randrange(len(self._arrivals) - self._count + 1)
        part = self._arrivals[first : first + self._count]
        begin, span_s = part[0].arrival_s, part[-1].arrival_s - part[0].arrival_s
        factor = (len(part) - 1) / rate_rps / span_s if span_s > 0 else 0.0
        return [replace(one, arrival_s=(one.arrival_s - begin) * factor) for one in part]

    def _tree(self, pools: Pools) -> dict[str, Any]:
        links = [pool.offer.link for pool in pools]
        away = [pool.terms.away_s for pool in pools if pool.market is Market.SPOT]
        notice = [pool.terms.notice_s for pool in pools if pool.market is Market.SPOT]
        sim: dict[str, Any] = {
            "pools": [self._pool(pool) for pool in pools],
            "links": {
                "bandwidth": int(min(link.bytes_per_s for link in links)),
                "latency": max(link.latency_s for link in links),
            },
            "slo": {"ttft_s": self._slo.ttft_s, "tbt_s": self._slo.tbt_s},
        }
        if away:
            sim |= {"start_s": max(away), "notice_s": min(notice)}
        return {"engine": {"max_running": RUNNING_MAX, "block_size": self._block_tokens}, "sim": sim}

    def _pool(self, pool: Pool) -> dict[str, Any]:
        offer = pool.offer
        if offer not in self._profiles:
            path = self._folder / f"{len(self._profiles)}.json"
            write_cost_model(offer.cost, str(path))
            self._profiles[offer] = str(path)
        return {
            "role": pool.role.value,
            "count": pool.replicas,
            "gpu": offer.gpu,
            "tp": offer.layout.tp,
            "pp": offer.layout.pp,
            "profile": self._profiles[offer],
            "kv_bytes": offer.kv_tokens * offer.cost.kv_token_bytes,
            "max_step_tokens": offer.step_tokens,
            "usd_per_gpu_hour": pool.terms.usd_per_hour,
            "market": pool.market.value,
        }

    def _faults(self, pools: Pools, until_s: float, seed: int) -> list[Fault]:
        """Notices at the offer's rate, each replica of a spot market for itself."""
        draw = random.Random(f"interruptions {seed}")
        found: list[Fault] = []
        numbers: dict[WorkerRole, int] = {}
        for pool in pools:
            for number in range(numbers.get(pool.role, 0), numbers.get(pool.role, 0) + pool.replicas):
                at_s = draw.expovariate(pool.terms.interruptions_per_hour / HOUR_S) if _taken(pool) else until_s
                if at_s < until_s:
                    found.append(Fault(at_s, "notice", f"{pool.role.value}-{number}"))
            numbers[pool.role] = numbers.get(pool.role, 0) + pool.replicas
        return found


def _block_tokens(arrivals: Sequence[Arrival]) -> int:
    """The cost of a simulation is mostly that of blocks: of long requests, whose rounding to larger blocks is hardly felt."""
    mean = sum(one.input_tokens + one.output_tokens for one in arrivals) / len(arrivals)
    return max(tokens for tokens in BLOCK_TOKENS if tokens == BLOCK_TOKENS[0] or tokens * BLOCKS_A_REQUEST <= mean)


def _prepare(world: World, faults: Sequence[Fault]) -> None:
    Mischief(world, faults)


def _taken(pool: Pool) -> bool:
    return pool.market is Market.SPOT and pool.terms.interruptions_per_hour > 0
