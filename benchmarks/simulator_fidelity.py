"""How near the simulator is to real processes, and what a wrong cost model costs.

Claims (issue "The simulator and the planner"), all stated
- A small workload through `tandem up` (local launcher, demo model, two workers on two cores) and through the simulator: the
  error of TTFT, TPOT, TBT percentiles, of attainment and throughput. Once with the cost model that `tandem profile` wrote on
  the same machine a moment before ("profiled"): one worker that has the machine alone, while in the cluster two workers, the
  router and the load generator share it. And once with what the workers of that very cluster have learned that their steps
  cost, as they report it to routers ("learned"): the difference is the neighbours', what is left is the simulator's, which
  knows nothing of processes that wait for a processor or for each other.
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
from collections.abc import Mapping, Sequence
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
from cli.admin import status
from core.config import Config
from core.cost_file import read_cost_model, write_cost_model
from core.cost_model import CostModel, LinkCost, StepCost
from core.latency import summarize
from core.report import WorkerReport
from core.request import Slo
from sim.run import simulate
from sim.workload import Arrival
from sim.world import World

REAL = (RealShape(1, 1, 0, 256), RealShape(0, 0, 2, 128))
RATES = {True: (2.0,), False: (1.0, 2.0, 3.0)}
SECONDS = {True: 12.0, False: 60.0}
LIMITS = Slo(ttft_s=1.0, tbt_s=0.06, tpot_s=0.06)
SPREADS = ("ttft_s", "tpot_s", "tbt_s", "e2e_s")
WRONG_SHAPE = Shape(2, 2, 0, 256)
WRONG_RATES = {True: (16.0,), False: (16.0, 19.0)}
ROLES = ("prefill", "decode", "colocated")
SEED = 5
Models = Mapping[str, CostModel]
"""By role."""


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


async def really(shape: RealShape, load: Conversations, rate: float, seconds: float) -> tuple[dict[str, Any], Models]:
    """What users saw, and what the workers of each role learned that their steps cost."""
    with ours(shape) as cluster:
        async with warmed(grpc_target(cluster.grpc, LIMITS), load) as target:
            traces = await offer(target, load, rate, seconds, SEED)
        reports = [member.report for member in status(cluster.admin).members]
    took_s = max(trace.end_s for trace in traces) - min(trace.start_s for trace in traces)
    return summarize(traces, LIMITS, took_s), learned(reports)


def learned(reports: Sequence[WorkerReport]) -> Models:
    """Of each role the worker that has seen most steps. Raises RuntimeError when nobody has seen enough of them."""
    found: dict[str, tuple[int, CostModel]] = {}
    for one in reports:
        if one.step_cost is None or one.layout is None:
            continue
        if one.step_cost.samples > found.get(one.role.value, (0,))[0]:
            found[one.role.value] = one.step_cost.samples, CostModel(one.step_cost.cost, one.layout.token_bytes)
    if not found:
        raise RuntimeError("no worker has learned what its steps cost; is the load long enough?")
    return {role: model for role, (_, model) in found.items()}


def simulated(
    shape: RealShape, load: Conversations, rate: float, seconds: float, models: Models, link: LinkCost | None
) -> dict[str, Any]:
    jobs = load.jobs(rate, seconds, SEED)
    arrivals = [Arrival(job.due_s, job.prompt_tokens, job.max_tokens) for job in jobs]
    tree = shape.tree("goodput")
    tree["sim"] = {"slo": {"ttft_s": LIMITS.ttft_s, "tbt_s": LIMITS.tbt_s, "tpot_s": LIMITS.tpot_s}}
    if link is not None:
        tree["sim"]["links"] = {"bandwidth": max(1, int(link.bytes_per_s)), "latency": link.latency_s}
    with tempfile.TemporaryDirectory() as folder:
        counts = {"prefill": shape.prefill, "decode": shape.decode, "colocated": shape.colocated}
        tree["sim"]["pools"] = pools = []
        for role, count in counts.items():
            if count:
                path = f"{folder}/{role}.json"
                write_cost_model(models[role], path)
                pools.append({"role": role, "count": count, "profile": path})
        return simulate(Config.model_validate(tree), arrivals).report


def real_rows(quick: bool) -> list[Row]:
    say("tandem profile ...")
    model, load, seconds = profiled(), Conversations(AzureConversation()), SECONDS[quick]
    rows: list[Row] = []
    errors: dict[str, list[float]] = {"profiled": [], "learned": []}
    for shape in REAL:
        for rate in RATES[quick]:
            say(f"{shape.name}, {rate:g}/s ...")
            real, known = asyncio.run(really(shape, load, rate, seconds))
            for kind, models in (("profiled", dict.fromkeys(ROLES, model)), ("learned", known)):
                there = simulated(shape, load, rate, seconds, models, model.links.get("shm"))
                name = f"{kind}.{'split' if shape.prefill else 'colocated'}.{rate:g}"
                found = compared(name, f"{shape.name}, {rate:g}/s, {kind}", there, real)
                errors[kind] += [abs(row.measured) for row in found if row.unit == "of real" and row.measured is not None]
                rows += found
    hows = {
        "profiled": f"cost model of tandem profile, held-out median error {model.heldout_median_error:.1%}",
        "learned": "cost models that the workers themselves learned meanwhile",
    }
    for kind, found_errors in errors.items():
        mean = fmean(found_errors) if found_errors else None
        rows.append(Row(f"error.{kind}", f"mean absolute error, {kind}", mean, "of real", how=hows[kind]))
    return rows


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
    for rate in WRONG_RATES[quick]:
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
