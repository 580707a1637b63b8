"""How near the simulator is to real processes, and what a wrong cost model costs.

Claims (issue "The simulator and the planner"), all stated
- A small workload through `tandem up` (local launcher, demo model, two workers on two cores) and through the simulator with the
  cost model that `tandem profile` wrote on the same machine a moment before: the error of TTFT, TPOT, TBT percentiles, of
  attainment and throughput. The simulator knows nothing of the load generator and router that share the cores.
- Routers that believe a wrong cost model, in the simulator: half or twice as quick as the truth, blind to lengths (flat), and
  wrong about each worker differently (skewed): attainment beside that with the true one. Outcomes correct what is believed, so
  that the same factor everywhere hurts little.

    python -m benchmarks.simulator_fidelity [--quick] [--data DIR] [--json FILE] [--only real,wrong]
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.azure_lengths import AzureConversation, Conversations
from benchmarks.goodput_search import offer, say, warmed
from benchmarks.goodput_systems import Shape as RealShape
from benchmarks.goodput_systems import grpc_target, ours
from benchmarks.rows import Row, arguments, report
from benchmarks.simulator_search import TBT_SLACK, TTFT_SLACK, unloaded
from benchmarks.simulator_workloads import COPIED_WORKLOAD, WORKLOADS, Limits, Shape, config_of, excerpt, rate_of
from core.config import Config
from core.cost_file import read_cost_model
from core.cost_model import CostModel, StepCost
from core.latency import summarize
from core.request import Slo
from sim.run import simulate
from sim.workload import Arrival
from sim.world import World

REAL = (RealShape(1, 1, 0, 256), RealShape(0, 0, 2, 128))
RATES = {True: (2.0,), False: (1.0, 2.0, 3.0)}
SECONDS = {True: 25.0, False: 60.0}
LIMITS = Slo(ttft_s=1.0, tbt_s=0.06, tpot_s=0.06)
SPREADS = ("ttft_s", "tpot_s", "tbt_s", "e2e_s")
WRONG_SHAPE = Shape(2, 2, 0, 256)
WRONG_RATES = (16.0, 19.0)
SEED = 5


def error(simulated: float | None, real: float | None) -> float | None:
    """Relative to the real one."""
    return (simulated - real) / real if simulated is not None and real else None


def profiled() -> CostModel:
    """What `tandem profile` measures here now. Raises RuntimeError with what it said when it does not come to an end."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cost.json"
        command = [sys.executable, "-m", "cli.main", "profile", "--json", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            raise RuntimeError(f"tandem profile failed: {done.stderr[-500:]}")
        return read_cost_model(str(path))


async def really(shape: RealShape, load: Conversations, rate: float, seconds: float) -> dict[str, Any]:
    with ours(shape) as cluster:
        async with warmed(grpc_target(cluster.grpc, LIMITS), load) as target:
            traces = await offer(target, load, rate, seconds, SEED)
    return summarize(traces, LIMITS, max(trace.end_s for trace in traces) - min(trace.start_s for trace in traces))


def simulated(shape: RealShape, load: Conversations, rate: float, seconds: float, model: CostModel) -> dict[str, Any]:
    jobs = load.jobs(rate, seconds, SEED)
    arrivals = [Arrival(job.due_s, job.prompt_tokens, job.max_tokens) for job in jobs]
    tree = shape.tree("goodput")
    tree["sim"] = {"slo": {"ttft_s": LIMITS.ttft_s, "tbt_s": LIMITS.tbt_s, "tpot_s": LIMITS.tpot_s}}
    link = model.links.get("shm")
    if link is not None:
        tree["sim"]["links"] = {"bandwidth": max(1, int(link.bytes_per_s)), "latency": link.latency_s}
    return simulate(Config.model_validate(tree), arrivals, model=model).report


def real_rows(quick: bool) -> list[Row]:
    say("tandem profile ...")
    model, load, seconds = profiled(), Conversations(AzureConversation()), SECONDS[quick]
    rows, errors = [], []
    for shape in REAL:
        for rate in RATES[quick]:
            real = asyncio.run(really(shape, load, rate, seconds))
            there = simulated(shape, load, rate, seconds, model)
            name = f"{'split' if shape.prefill else 'colocated'}.{rate:g}"
            found = compared(name, f"{shape.name}, {rate:g}/s", there, real)
            errors += [abs(row.measured) for row in found if row.unit == "of real" and row.measured is not None]
            rows += found
    how = f"cost model of tandem profile, held-out median error {model.heldout_median_error:.1%}"
    mean = fmean(errors) if errors else None
    return [*rows, Row("error.mean", "mean absolute error of all percentiles", mean, "of real", how=how)]


def compared(name: str, what: str, there: Mapping[str, Any], real: Mapping[str, Any]) -> list[Row]:
    """A row for each percentile, for attainment (a difference) and for throughput."""
    rows = []
    for spread in SPREADS:
        for percent in ("p50", "p90", "p99"):
            one, other = there[spread][percent], real[spread][percent]
            how = f"simulated {(one or 0) * 1e3:.1f} ms, real {(other or 0) * 1e3:.1f} ms"
            claim = f"{what}: {spread.removesuffix('_s')} {percent}, error"
            rows.append(Row(f"{name}.{spread}.{percent}", claim, error(one, other), "of real", peer="real processes", how=how))
    for kind in ("joint", "joint_mean"):
        one, other = there["attainment"][kind], real["attainment"][kind]
        claim, how = f"{what}: attainment ({kind}), difference", f"simulated {one:.1%}, real {other:.1%}"
        rows.append(Row(f"{name}.attainment.{kind}", claim, one - other, "", peer="real processes", how=how))
    one, other = there["output_tokens_per_s"], real["output_tokens_per_s"]
    claim, how = f"{what}: throughput, error", f"simulated {one:.1f} tokens/s, real {other:.1f}"
    return [*rows, Row(f"{name}.throughput", claim, error(one, other), "of real", peer="real processes", how=how)]


def flat(cost: StepCost) -> StepCost:
    """Every step takes as long as one of a prompt of 512 tokens, whatever is in it."""
    return StepCost(cost.prefill_s(512), 0.0, 0.0, 0.0, 0.0)


def wrong(kind: str, cost: StepCost, number: int) -> StepCost:
    """What is believed of the worker with this number."""
    factors = {"true": 1.0, "half": 0.5, "twice": 2.0, "skewed": 2.0 if number % 2 else 0.5}
    return flat(cost) if kind == "flat" else cost.scaled(factors[kind])


def mislead(kind: str, world: World) -> None:
    """Before time begins: workers report what is wrong, and take as long as before."""
    world.pools.believe(lambda number, replica: replace(replica, cost=wrong(kind, replica.cost, number)))


def wrong_rows(data: Path | None, quick: bool) -> list[Row]:
    workload = WORKLOADS[0] if data is not None else COPIED_WORKLOAD
    alone = unloaded(workload, data, quick)
    limits = Limits(TTFT_SLACK * alone[0], TBT_SLACK * alone[1], TBT_SLACK * alone[2])
    requests, config = excerpt(workload, data, quick), config_of(WRONG_SHAPE, limits, data)
    rows = []
    for rate in WRONG_RATES:
        truth: float | None = None
        for kind in ("true", "half", "twice", "flat", "skewed"):
            scale = rate / rate_of(requests)
            met = simulate(config, requests, "goodput", rate_scale=scale, prepare=partial(mislead, kind)).report["attainment"]
            say(f"{rate:g}/s, {kind}: {met['joint']:.1%}")
            truth = met["joint"] if truth is None else truth
            claim = f"attainment at {rate:g}/s, cost model {kind}"
            beside = f"{met['joint'] - truth:+.1%} against the true one; by mean TPOT {met['joint_mean']:.1%}"
            how = f"{beside}; {WRONG_SHAPE}, {limits}"
            rows.append(Row(f"wrong.{rate:g}.{kind}", claim, met["joint"], "", how=how))
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", default="real,wrong", help="which parts, separated by commas")
    options = parser.parse_args()
    parts = options.only.split(",")
    rows = wrong_rows(options.data, options.quick) if "wrong" in parts else []
    if "real" in parts:
        rows += real_rows(options.quick)
    report(rows, options.json)


if __name__ == "__main__":
    main()
