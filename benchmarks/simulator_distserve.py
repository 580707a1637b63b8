"""DistServe's simulated attainment and its placements, ours beside the published ones.

Claims: with DistServe's coefficients for OPT on A100 (Zhong et al., OSDI 2024), our search chooses its placement of OPT-13B
(table 3) and its prefill of OPT-66B. How far our play of its split replicas is from what its simulator reports (table 2,
DistServe-Low on OPT-66B), and its colocated baseline, are stated, not judged.

Why they differ: the lengths of its ShareGPT requests are not public. Ours are lognormal, cut at 2,048 tokens together, with
the means of its figure 7; a rate's attainment hangs on the tail of the prompts. The layout of the baseline in table 2 is not
given either. In the choice for OPT-66B, decode over TP2 PP2 and over TP4 are within a few percent of each other.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import numpy as np

from benchmarks.rows import Row, arguments, report
from cluster.planner_distserve import Machines, Search, Target, pair_goodput_rps, place_within_nodes
from cluster.planner_model import OPT_SHAPES, Arriving, FittedModel, Layout, fitted_model
from cluster.planner_play import play_colocated, play_split
from core.request import Slo

COPIED = Path(__file__).resolve().parent.parent / "tests/data"
RATES = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0)
SPLIT = (100.0, 100.0, 99.3, 88.3, 84.1, 77.0, 68.9)
VLLM = (96.8, 65.1, 51.0, 46.1, 38.3, 28.5, 24.1)
ABLATION = Slo(ttft_s=0.4, tpot_s=0.1)
REQUESTS = 200
"""25 per GPU, as in their script of the ablation."""


def chat(rate_rps: float, seed: int = 0, count: int = 300) -> list[Arriving]:
    """Prompts of 710 and answers of 200 tokens in the mean, 2,048 together at most."""
    draw = np.random.default_rng(seed)
    prompts = np.clip(600 * np.exp(0.83 * draw.normal(size=count)), 4, 1850).astype(int)
    answers = np.clip(141 * np.exp(0.83 * draw.normal(size=count)), 1, 2048 - prompts).astype(int)
    at = np.cumsum(np.random.default_rng((seed, 1)).exponential(1.0, count)) / rate_rps
    return [Arriving(*one) for one in zip(at.tolist(), prompts.tolist(), answers.tolist(), strict=True)]


def model_of(folder: Path, name: str, engine: str) -> FittedModel:
    tree = json.loads((folder / f"profiler-a100-80g.{engine}.json").read_text())
    with (folder / "max_num_tokens.csv").open() as rows:
        return fitted_model(tree, list(csv.DictReader(rows)), name, engine)


def attained(play: Callable[[list[Arriving]], list], rate_rps: float, seeds: int) -> float:  # type: ignore[type-arg]
    target = Target(ABLATION)
    return 100 * fmean(target.attained(play(chat(rate_rps, seed, REQUESTS))) for seed in range(seeds))


def table(folder: Path, seeds: int) -> list[Row]:
    ours, theirs = model_of(folder, "facebook/opt-66b", "distserve"), model_of(folder, "facebook/opt-66b", "vllm")
    rows = []
    for rate, split, colocated in zip(RATES, SPLIT, VLLM, strict=True):
        share = attained(lambda requests: play_split(requests, ours, Layout(4, 1), Layout(2, 2)), rate, seeds)
        how = f"{share:.1f} % here, {split:.1f} % published; 8 GPUs, {REQUESTS} requests, {seeds} seeds"
        claim = f"OPT-66B split, {rate:g} req/s: points from the published attainment"
        rows.append(Row(f"distserve.split.{rate:g}", claim, abs(share - split), "points", peer="simdistserve", how=how))
        for tp in (4, 8):
            share = attained(lambda requests, tp=tp: play_colocated(requests, theirs, Layout(tp, 1)), rate, seeds)
            claim = f"vLLM's engine colocated, TP{tp}, {rate:g} req/s (published: {colocated:.1f} %)"
            rows.append(Row(f"distserve.vllm.tp{tp}.{rate:g}", claim, share, "%", peer="simdistserve"))
    return rows


def placements(folder: Path) -> list[Row]:
    small, large = model_of(folder, "facebook/opt-13b", "distserve"), model_of(folder, "facebook/opt-66b", "distserve")
    target = Target(Slo(ttft_s=0.2, tpot_s=0.1), jointly=False)
    found = place_within_nodes(OPT_SHAPES["facebook/opt-13b"], Machines(1, 4), small, chat, target, 10.0, Search())
    same = (found.prefill, found.decode) == (Layout(2, 1), Layout(1, 1))
    rows = [
        Row(
            "distserve.place.13b", "OPT-13B on 4 GPUs: prefill TP2, decode TP1 chosen", float(same), "yes", 1.0, how=str(found)
        ),
        Row("distserve.rate.13b", "… goodput per GPU (their README: 1.56)", found.per_gpu_rps, "req/s", peer="simdistserve"),
    ]
    target = Target(Slo(ttft_s=2.5, tpot_s=0.15), jointly=False)
    search = Search(step_rps=0.025)
    found = place_within_nodes(OPT_SHAPES["facebook/opt-66b"], Machines(1, 8), large, chat, target, 10.0, search)
    theirs = pair_goodput_rps(Layout(4, 1), Layout(2, 2), large, chat, target, search) / 8
    how = f"chosen here: {found}"
    return [
        *rows,
        Row(
            "distserve.place.66b",
            "OPT-66B on 8 GPUs: prefill TP4 chosen",
            float(found.prefill == Layout(4, 1)),
            "yes",
            1.0,
            how=how,
        ),
        Row(
            "distserve.tie.66b", "… goodput of theirs (TP4, TP2 PP2) over the chosen", theirs / found.per_gpu_rps, "x", how=how
        ),
    ]


def main() -> None:
    given = arguments(__doc__).parse_args()
    folder = (given.data / "profiles" if given.data else COPIED) / "distserve"
    report([*table(folder, 3 if given.quick else 10), *placements(folder)], given.json)


if __name__ == "__main__":
    main()
