"""Goodput per dollar on spot instances that come and go as recorded, against on-demand ones, simulated.

The cluster of `simulator_goodput.py`, a machine per instance as far as the trace has any at its start, half of them for
prefill. Instances go when the trace says so, after a notice of two minutes (AWS), on which the router places elsewhere; what
has not ended by then is placed again by its journey and computed anew. Prices are those of SpotServe's instances, 1.9 against
3.9 dollars an hour (g4dn.12xlarge), times the machines that are up; on-demand machines are as many, and stay.

Figures (stated, not judged): goodput per dollar against on-demand only, on each trace; the same without a notice, and where
every request ends at the full speed of a machine that costs and holds nothing (an oracle that moves each for free): the most
that a smarter evacuation could gain. With --quick four minutes of one trace on four machines, else fifty of four on six.

    python -m benchmarks.simulator_spot --data DIR [--quick] [--json FILE] [--only NAME,NAME] [--plots DIR]
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from enum import Enum
from itertools import cycle, islice, pairwise
from multiprocessing import get_context
from pathlib import Path

from benchmarks.rows import Row, arguments, report
from benchmarks.simulator_search import TBT_SLACK, TTFT_SLACK, unloaded
from benchmarks.simulator_workloads import COPIED_WORKLOAD, WORKLOADS, Limits, Shape, Workload, config_of, excerpt
from sim.cluster import worker_names
from sim.faults import Fault, read_faults
from sim.report_plots import Plan, pareto
from sim.report_timeline import Timeline
from sim.run import simulate
from sim.workload import Arrival, at_times
from sim.workload_shapes import Arrivals, arrivals

SPOT_USD, ON_DEMAND_USD = 1.9, 3.9
NOTICE_S = 120.0
RATE_PER_MACHINE = 2.5
"""Requests per second: about half of what machines sustain that stay."""
MACHINES_MAX = {True: 4, False: 6}
DURATION_S = {True: 240.0, False: 3000.0}
TRACES = ("spotserve_trace_0203", "spotserve_trace_0304_tight", "spotserve_trace_0304", "parcae_p3_segment_hh_55_65")
QUICK_TRACES = ("spotserve_trace_0203_tight",)
"""The first one in less time: of four machines one goes after 150 s and comes again after 210."""
FOREVER_S = 1e6


class Kind(Enum):
    ON_DEMAND = "on-demand only"
    NOTICE = "spot, as the journey does today"
    SUDDEN = "spot, no notice"
    ORACLE = "spot, requests moved for free"


@dataclass(frozen=True, slots=True)
class Run:
    kind: Kind
    trace: str
    data: Path
    machines: int
    duration_s: float
    limits: Limits


@dataclass(frozen=True, slots=True)
class Outcome:
    """`machine_hours`: of those that were up. `met`: requests within their limits of TTFT and TBT; `met_mean`: by mean TPOT."""

    run: Run
    requests: int
    met: int
    met_mean: int
    failovers: int
    machine_hours: float
    lost: int

    def per_dollar(self, paid: Outcome, mean: bool = False) -> float:
        """Requests in time per dollar; `paid`: whose machines are paid."""
        usd = ON_DEMAND_USD if self.run.kind is Kind.ON_DEMAND else SPOT_USD
        return (self.met_mean if mean else self.met) / (usd * paid.machine_hours)


def announced(faults: Iterable[Fault], kind: Kind, notice_s: float = NOTICE_S) -> list[Fault]:
    """The faults of a spot trace, in which a notice stands where the machine is gone: told of before, or not, or never gone for
    what runs there."""
    found = []
    for fault in faults:
        if fault.kind != "notice":
            found.append(fault)
            continue
        early_s = min(notice_s, fault.at_s)
        match kind:
            case Kind.SUDDEN:
                found.append(replace(fault, kind="kill"))
            case Kind.ORACLE:  # used until the last moment, which a drain on notice is not
                found.append(replace(fault, for_s=FOREVER_S))
            case _:
                found.append(replace(fault, at_s=fault.at_s - early_s, for_s=early_s))
    return sorted(found, key=lambda fault: fault.at_s)


def machine_hours(timeline: Timeline, duration_s: float) -> float:
    """By the workers seen alive, each sample until the next."""
    seen = [(one.at_s, sum(pool.workers for pool in one.pools.values())) for one in timeline.samples if one.at_s <= duration_s]
    area = sum(count * (later - at) for (at, count), (later, _) in pairwise(seen))
    return area / 3600


def mixed(names: Sequence[str]) -> list[str]:
    """Workers of both roles in turn, as instances are dealt to them."""
    prefill = [name for name in names if name.startswith("prefill")]
    decode = [name for name in names if name.startswith("decode")]
    return [name for pair in zip(prefill, decode, strict=True) for name in pair]


def load(data: Path, rate: float, duration_s: float) -> list[Arrival]:
    """Azure's conversations one after another, again from the first one where they end, as a Poisson process."""
    requests = excerpt(_workload(data), data, quick=False)
    due = (at for at in islice(arrivals(rate, Arrivals.POISSON, 1.0, random.Random(3)), int(2 * rate * duration_s)))
    return list(at_times(cycle(requests), (at for at in due if at < duration_s)))


def _workload(data: Path | None) -> Workload:
    return WORKLOADS[0] if data is not None else COPIED_WORKLOAD


def play(run: Run) -> Outcome:
    shape = Shape(run.machines // 2, run.machines // 2, 0, 256)
    config = config_of(shape, run.limits, run.data)
    names = mixed(worker_names(config))
    path = str(run.data / "spot" / f"{run.trace}.csv")
    faults = [] if run.kind is Kind.ON_DEMAND else announced(read_faults(path, names), run.kind)
    timeline = Timeline(step_s=1.0)
    result = simulate(
        config,
        load(run.data, RATE_PER_MACHINE * run.machines, run.duration_s),
        "goodput",
        faults=[fault for fault in faults if fault.at_s < run.duration_s],
        prepare=timeline.watch,
    ).report
    met = result["attainment"]
    requests = result["requests"]
    return Outcome(
        run,
        requests,
        round(met["joint"] * requests),
        round(met["joint_mean"] * requests),
        result["failovers"],
        machine_hours(timeline, run.duration_s),
        result["rejected"] + result["failed"],
    )


def rows_of(trace: str, found: dict[Kind, Outcome]) -> list[Row]:
    fixed, spot = found[Kind.ON_DEMAND], found[Kind.NOTICE]
    dear, rows = fixed.per_dollar(fixed), []
    for kind, one in found.items():
        paid = found[Kind.SUDDEN] if kind is Kind.ORACLE else one
        ended = f"{one.met} of {one.requests} in time, {one.lost} lost, {one.failovers} placed again"
        how = f"{ended}; {paid.machine_hours:.2f} machine h; {one.run.machines} machines at first, {one.run.limits}"
        short = kind.name.lower()
        rows.append(Row(f"{trace}.{short}", f"{trace}: {kind.value}", one.per_dollar(paid), "req/$", how=how))
        if kind is not Kind.ON_DEMAND:
            claim, peer = f"{trace}: {kind.value} / on-demand, per dollar", Kind.ON_DEMAND.value
            mean = one.per_dollar(paid, mean=True) / fixed.per_dollar(fixed, mean=True)
            rows.append(Row(f"{trace}.{short}.ratio", claim, one.per_dollar(paid) / dear, "x", peer=peer))
            rows.append(Row(f"{trace}.{short}.ratio.mean", f"{claim}, by mean TPOT", mean, "x", peer=peer))
    room = found[Kind.ORACLE].met / max(spot.met, 1)
    return [*rows, Row(f"{trace}.room", f"{trace}: room of smarter evacuation", room, "x", peer=Kind.ORACLE.value)]


def draw(trace: str, found: dict[Kind, Outcome], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    plans = []
    for kind, one in found.items():
        paid, usd = found[Kind.SUDDEN] if kind is Kind.ORACLE else one, ON_DEMAND_USD if kind is Kind.ON_DEMAND else SPOT_USD
        hours = one.run.duration_s / 3600
        plans.append(Plan(kind.value, usd * paid.machine_hours / hours, one.met / one.run.duration_s))
    pareto(plans, f"{trace}: cost and goodput").savefig(folder / f"{trace}.png")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", help="which spot traces, separated by commas")
    parser.add_argument("--plots", type=Path, help="a folder for pictures of cost against goodput")
    options = parser.parse_args()
    if options.data is None:
        sys.exit("spot traces are read from a data folder: give --data DIR")
    traces = options.only.split(",") if options.only else QUICK_TRACES if options.quick else TRACES
    alone = unloaded(_workload(options.data), options.data, options.quick)
    limits = Limits(TTFT_SLACK * alone[0], TBT_SLACK * alone[1], TBT_SLACK * alone[2])
    duration_s, machines = DURATION_S[options.quick], MACHINES_MAX[options.quick]
    runs = [Run(kind, trace, options.data, machines, duration_s, limits) for trace in traces for kind in Kind]
    outcomes: dict[str, dict[Kind, Outcome]] = {}
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for one in pool.map(play, runs):
            outcomes.setdefault(one.run.trace, {})[one.run.kind] = one
            done = sum(map(len, outcomes.values()))
            text = f"{done}/{len(runs)} {one.run.trace}, {one.run.kind.value}: {one.met} of {one.requests} in time"
            print(text, file=sys.stderr, flush=True)
    for trace, found in outcomes.items() if options.plots else ():
        draw(trace, found, options.plots)
    report([row for trace, found in outcomes.items() for row in rows_of(trace, found)], options.json)


if __name__ == "__main__":
    main()
