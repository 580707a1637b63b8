"""Pictures of a plan: what else could be bought, and how goodput changes with the split. By closed forms, in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.planner_analytic import Analytic
from cluster.planner_offers import Market, Offer, Pools, Workload, gpus_of, shortage, usd_per_hour_of
from cluster.planner_sizes import candidates
from core.errors import ConfigError
from core.request import Slo, WorkerRole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sim.report_plots import Plan

SCALES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""Of the demand that alternatives are sized for."""
ALTERNATIVES = 6
AROUND = 3
"""Workers more and fewer that the grid shows on each side."""
HALVINGS = 20


def write_plots(folder: str, found: Pools, workload: Workload, offers: Sequence[Offer], slo: Slo, share: float) -> list[str]:
    """`cost_goodput.png`, where things have prices, and `pools.png`, where the plan is split into one pool of each role.
    Returns the paths. Raises ConfigError when nothing can be drawn or written there."""
    if find_spec("matplotlib") is None:
        raise ConfigError("pictures need matplotlib: install tandem[plot]")
    from sim.report_plots import grid, pareto

    quick = Analytic(workload, slo)
    figures: dict[str, Figure] = {}
    if usd_per_hour_of(found):
        plans = alternatives(found, workload, offers, slo, share, quick)
        figures["cost_goodput.png"] = pareto(plans, f"Cost and goodput, demand {workload.rate_rps:.3g} requests/s")
    if cells := around(found, workload, share, quick):
        figures["pools.png"] = grid(cells, "Goodput per GPU, requests/s")
    written = []
    for name, figure in figures.items():
        path = Path(folder) / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from None
        written.append(str(path))
    return written


def alternatives(
    found: Pools, workload: Workload, offers: Sequence[Offer], slo: Slo, share: float, quick: Analytic
) -> list[Plan]:
    """The plan itself and the cheapest ones for parts and multiples of the demand."""
    from sim.report_plots import Plan

    seen: dict[str, Pools] = {label_of(found): found}
    for scale in SCALES:
        for pools in candidates(workload, offers, slo, quick, scale * workload.rate_rps, share, ALTERNATIVES):
            seen.setdefault(label_of(pools), pools)
    return [Plan(label, usd_per_hour_of(pools), goodput_rps(pools, workload, share, quick)) for label, pools in seen.items()]


def around(found: Pools, workload: Workload, share: float, quick: Analytic) -> dict[tuple[int, int], float]:
    """Goodput per GPU by (prefill, decode) workers, near the plan; empty where it is not one pool of each."""
    by_role = {pool.role: pool for pool in found}
    if len(found) != 2 or by_role.keys() != {WorkerRole.PREFILL, WorkerRole.DECODE}:
        return {}
    first, second = by_role[WorkerRole.PREFILL], by_role[WorkerRole.DECODE]
    cells = {}
    for prefill in range(max(1, first.replicas - AROUND), first.replicas + AROUND + 1):
        for decode in range(max(1, second.replicas - AROUND), second.replicas + AROUND + 1):
            pools = (replace(first, replicas=prefill), replace(second, replicas=decode))
            if not shortage(pools):
                cells[prefill, decode] = goodput_rps(pools, workload, share, quick) / gpus_of(pools)
    return cells


def goodput_rps(pools: Pools, workload: Workload, share: float, quick: Analytic) -> float:
    """The highest rate at which so many requests are within their limits."""

    def met(rate_rps: float) -> bool:
        return quick(pools, rate_rps).joint >= share

    low, high = 0.0, workload.rate_rps
    while met(high):
        low, high = high, 2 * high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if met(middle) else (low, middle)
    return low


def label_of(pools: Pools) -> str:
    """2P + 3D h100-80g tp 4."""
    parts: dict[str, list[str]] = {}
    for pool in pools:
        spot = "*" if pool.market is Market.SPOT else ""
        parts.setdefault(str(pool.offer), []).append(f"{pool.replicas}{pool.role.value[0].upper()}{spot}")
    return ", ".join(f"{' + '.join(counts)} {offer}" for offer, counts in parts.items())
