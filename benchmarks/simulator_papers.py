"""Figures of papers beside ours: VTC's bound, FastServe's toy example, SpotServe's configurations.

Claims (issue "The simulator and the planner"): VTC's bound and FastServe's toy example exact, through the shipped queue
(`benchmarks/vtc_bound.py`, `benchmarks/fastserve_toy.py` say how); SpotServe's controller decides what its paper reports.

VTC's published growth of the difference under first come, first served (to about 300,000 in 500 s) is of a machine whose step
times are not published; here it is stated per second, and that it passes the bound. FastServe's jobs are ours, see there. Of
SpotServe the rates of the fluctuating load are read off a figure, so any rate in a range gives its decisions; ours are in rows.

    python -m benchmarks.simulator_papers [--quick] [--json FILE]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks import fastserve_toy, vtc_bound
from benchmarks.rows import Row, arguments, report
from cluster.planner_spot import Fleet, LayerProfile, Pipeline, decide, layer_profile

SPOTSERVE = Path(__file__).resolve().parent.parent / "tests/data/spotserve"
DECISIONS = (  # situation, instances, requests/s, (D, P, M) as reported
    ("stable load, 8 instances", 8, 0.35, (2, 2, 8)),
    ("stable load, 10 instances", 10, 0.35, (2, 2, 8)),
    ("stable load, one of 8 taken", 7, 0.35, (2, 3, 4)),
    ("fluctuating load, start, 10 instances", 10, 0.55, (2, 2, 8)),
    ("fluctuating load, overload, 10 instances", 10, 0.75, (3, 3, 4)),
    ("fluctuating load, 12 instances", 12, 0.75, (3, 2, 8)),
    ("fluctuating load falls, 12 instances", 12, 0.55, (2, 2, 8)),
)
LATENCIES = (("T4-4x_megatron_6.7B_profile.json", (1, 4), 5.447), ("T4-4x_megatron_h6144_profile.json", (3, 4), 14.373))


def vtc(seconds: float) -> list[Row]:
    fair, line = (vtc_bound.play(one, seconds, seed=0) for one in (True, False))
    how = f"{seconds:.0f} s of 1.5 and 3 requests/s, {fair.tokens_per_s:.0f} tokens/s (published: about 780)"
    theorem, lemma = "2U = 40,000 (theorem 4.4)", "U = 20,000"
    named = (
        ("max", "largest difference of service between two backlogged clients", max(fair.gaps), vtc_bound.BOUND, theorem),
        ("avg", "mean difference of their service", sum(fair.gaps) / len(fair.gaps), vtc_bound.BOUND, theorem),
        ("counters", "largest difference of their counters", fair.counters, vtc_bound.BOUND / 2, lemma),
    )
    rows = [Row(f"vtc.{name}", f"VTC: {said}", value, "", bar, "<=", peer, how) for name, said, value, bar, peer in named]
    said = "first come, first served: how fast the difference grows (published: about 600)"
    rows.append(Row("fcfs.growth", said, line.gaps[-1] / seconds, "1/s", peer="VTC, figure 3", how=how))
    said = "first come, first served: difference at the end over that half-way, 2 where it grows with time"
    return [*rows, Row("fcfs.linear", said, line.growth, "x", 1.8, peer="VTC, figure 3", how=how)]


def fastserve() -> list[Row]:
    found = fastserve_toy.latencies()
    rows = []
    for schedule, published in fastserve_toy.PUBLISHED.items():
        digits = len(f"{published:g}".partition(".")[2])
        off = abs(round(found[schedule], digits) - published)
        said = f"FastServe's toy, {schedule}: off the published mean latency of {published:g}, to its digits"
        rows.append(Row(f"fastserve.{schedule}", said, off, "", 0.0, "<=", "FastServe, section 4.1", f"{found[schedule]:.4f}"))
    return rows


def spotserve() -> list[Row]:
    rows = []
    for name, (stages, tensor), published in LATENCIES:
        found = _profile(name).latency_s(Pipeline(stages, tensor, 1), 128)
        said = f"SpotServe: latency of (P, M) = ({stages}, {tensor}) at batch 1 (published {published} s), relative error"
        how = f"{found:.3f} s from {name}"
        rows.append(Row(f"spotserve.latency.{name[:-5]}", said, abs(found / published - 1), "", 0.001, "<=", "SpotServe", how))
    model = _profile(LATENCIES[1][0])
    agree = []
    for situation, instances, rate, reported in DECISIONS:
        decision = decide(model, Fleet(instances, gpus_min=12), rate)
        shape = decision.configuration.shape if decision else None
        agree.append(shape == reported)
        said = f"SpotServe, {situation}: (D, P, M) as reported {reported}"
        rows.append(Row(f"spotserve.{situation.replace(' ', '_')}", said, float(agree[-1]), "", 1.0, how=f"{rate}/s: {shape}"))
    return rows


def _profile(name: str) -> LayerProfile:
    return layer_profile(json.loads((SPOTSERVE / name).read_text()), name)


def rows(quick: bool) -> list[Row]:
    return [*vtc(180.0 if quick else 500.0), *fastserve(), *spotserve()]


def main() -> int:
    args = arguments(__doc__).parse_args()
    report(rows(args.quick), args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
