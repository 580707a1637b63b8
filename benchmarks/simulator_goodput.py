"""Goodput per GPU on public traces, simulated: the `goodput` policy against every other one and against chunked prefill.

The product's router, schedulers and inventory on virtual time, on machines whose steps were measured by others (Llama-3.3-70B
in FP8 on four H100, NVIDIA Dynamo's profile of vLLM). Of an excerpt of each trace, run at other speeds, the highest rate is
found at which 90 % of the requests are within their limits, TTFT and TBT together; by mean TPOT beside. Limits are those that
Splitwise sets at its 90th percentile, 3 x the TTFT and 1.5 x the TBT of an uncontended A100: an H100 is 2.0 and 1.5 times as
quick there, so 6 x and 2.25 x what a request alone takes, means over the excerpt, the same for everybody.

Claims (issue "The simulator and the planner")
- `goodput`, its pools and chunks chosen among the shapes below (mixed ones among them), is at least equal to the best of all
  other policies over the same machines on every trace, and 1.1 x it in the geometric mean. They run on the shape that `goodput`
  chose, and where that is a mixed one also on the best one that only splits, and the better counts.
- And 1.3 x colocated serving with chunked prefill (Sarathi) in the geometric mean, its chunk size chosen among as many.
- With looser limits, 5 x either: stated.

With --medium (20 minutes for all traces) excerpts are short, shapes and chunks few, rates coarser. With --quick, a first look,
ours has one shape, chunked prefill two chunk sizes, and the other policies are those that came nearest before.

    python -m benchmarks.simulator_goodput [--quick | --medium] [--data DIR] [--json FILE] [--only NAME,NAME] [--plots DIR]
        [--skip N]
"""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path

from benchmarks.rows import Row, arguments, report
from benchmarks.simulator_search import SHARE, TBT_SLACK, TTFT_SLACK, Found, Task, search, unloaded
from benchmarks.simulator_workloads import COPIED_WORKLOAD, ENGINE, WORKLOADS, Limits, Shape, Workload, excerpt, rate_of
from cli.attainment_plot import Line, draw_lines
from router.policies import POLICIES
from sim.report_plots import grid

OURS = "goodput"
CHUNKED = "least_load"
OTHERS = tuple(name for name in POLICIES if name != OURS)
RIVALS = ("least_load", "conductor")
"""One of them is the best other policy, or within 1 % of it, on every trace."""
MACHINES = 4
CHUNKS = {True: (128, 256, 512), False: (64, 128, 256, 512, 1024)}
SHAPES = {
    True: (Shape(3, 1, 0, 256), Shape(2, 2, 0, 256), Shape(2, 1, 1, 256), Shape(2, 1, 1, 128)),
    False: (
        *(Shape(*pools, 256, chunk) for pools in ((3, 1, 0), (2, 2, 0), (1, 3, 0)) for chunk in (512, 2048)),
        *(Shape(*pools, mixed, chunk) for pools in ((2, 1, 1), (1, 1, 2)) for mixed in (128, 256) for chunk in (512, 2048)),
    ),
}
"""True: with --medium or --quick."""
FIRST_LOOK, FIRST_CHUNKS = (Shape(2, 2, 0, 256),), (128, 256)
"""With --quick."""
LOOSE = 5.0


@dataclass(frozen=True, slots=True)
class Effort:
    """What is tried. `halvings`: of the bracket between a rate that is met and one that is not."""

    shapes: tuple[Shape, ...]
    chunks: tuple[int, ...]
    others: tuple[str, ...]
    halvings: int
    on_theirs: bool = True
    """Ours also on the shape that is best for chunked prefill."""


EFFORTS = {
    "quick": Effort(FIRST_LOOK, FIRST_CHUNKS, RIVALS, 2, on_theirs=False),
    "medium": Effort(SHAPES[True], CHUNKS[True], OTHERS, 2),
    "whole": Effort(SHAPES[False], CHUNKS[False], OTHERS, 4),
}


@dataclass(slots=True)
class Study:
    workload: Workload
    limits: Limits
    ours: list[Found] = field(default_factory=list)
    chunked: list[Found] = field(default_factory=list)
    others: dict[str, list[Found]] = field(default_factory=dict)


def best(found: Iterable[Found]) -> Found:
    return max(found, key=lambda one: (one.per_gpu, one.mean_per_gpu))


def ratio(ours: float, theirs: float) -> float | None:
    return ours / theirs if theirs > 0 else None


def geometric_mean(values: Sequence[float | None]) -> float | None:
    """None when one is missing, or there is none."""
    known = [value for value in values if value]
    return math.exp(sum(map(math.log, known)) / len(known)) if known and len(known) == len(values) else None


class Runner:
    """Searches on all cores, told of on standard error with the time that is left."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def run(self, what: str, tasks: Sequence[Task]) -> list[Found]:
        started, found = time.monotonic(), []
        for done, one in enumerate(self._pool.map(search, tasks), start=1):
            found.append(one)
            spent = time.monotonic() - started
            task = one.task
            name = f"{task.workload.name} {task.policy} {task.shape}"
            left = f"{done}/{len(tasks)}, {spent * (len(tasks) - done) / done:.0f} s left"
            say(f"{what} ({left}): {name}: {one.rate_rps:.3g}/s, by mean TPOT {one.mean_rps:.3g}/s")
        return found


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def first_guess(workload: Workload, alone: tuple[float, float, float], data: Path | None, quick: bool) -> float:
    """Half of what machines could take that compute one request's prompt at a time, and decode thirty together."""
    requests = excerpt(workload, data, quick)
    told = sum(one.output_tokens for one in requests) / len(requests)
    return 0.5 * MACHINES / (alone[0] + told * alone[2] / 30)


def tasks_of(study: Study, shapes: Iterable[Shape], policies: Iterable[str], like: Task) -> list[Task]:
    return [
        replace(like, workload=study.workload, limits=study.limits, shape=shape, policy=policy)
        for shape in shapes
        for policy in policies
    ]


def studied(
    runner: Runner, workload: Workload, data: Path | None, quick: bool, effort: Effort, slacks: tuple[float, float]
) -> Study:
    """Ours and colocated first, the other policies on what was best."""
    alone = unloaded(workload, data, quick)
    study = Study(workload, Limits(slacks[0] * alone[0], slacks[1] * alone[1], slacks[1] * alone[2]))
    guess = first_guess(workload, alone, data, quick)
    like = Task(workload, Shape(0, 0, MACHINES, 0), OURS, study.limits, data, quick, guess, effort.halvings)
    wholes = [Shape(0, 0, MACHINES, chunk) for chunk in effort.chunks]
    tried = tasks_of(study, effort.shapes, [OURS], like) + tasks_of(study, wholes, [CHUNKED], like)
    for one in runner.run("shapes", tried):
        (study.ours if one.task.policy == OURS else study.chunked).append(one)
    like = replace(like, guess_rps=best(study.chunked).rate_rps or guess)
    if effort.on_theirs:
        study.ours += runner.run("shapes", tasks_of(study, [best(study.chunked).task.shape], [OURS], like))
    return study


def against_policies(runner: Runner, study: Study, others: Iterable[str]) -> None:
    ours = best(study.ours)
    shapes = [ours.task.shape]
    split = best(one for one in study.ours if not one.task.shape.colocated).task.shape
    shapes += [split] if split not in shapes else []
    like = replace(ours.task, guess_rps=ours.rate_rps or ours.task.guess_rps)
    for one in runner.run("policies", tasks_of(study, shapes, others, like)):
        study.others.setdefault(one.task.policy, []).append(one)


def rows_of(study: Study) -> list[Row]:
    ours, chunked = best(study.ours), best(study.chunked)
    name, title = study.workload.name, study.workload.title
    count = len(excerpt(study.workload, ours.task.data, ours.task.quick))
    skipped = f" after {study.workload.skip}" if study.workload.skip else ""
    how = f"{ENGINE}; {study.limits}; first {count} requests{skipped}, {MACHINES} machines of 4 GPUs"
    rows = []
    for kind, found in (("goodput", ours), ("chunked", chunked), *((key, best(value)) for key, value in study.others.items())):
        said = f"{found.task.shape}; {how}"
        label = "colocated, chunked prefill" if kind == "chunked" else kind
        rows += [
            Row(f"{name}.{kind}", f"{title}: {label}", found.per_gpu, "req/s/GPU", how=said),
            Row(f"{name}.{kind}.mean", f"{title}: {label}, by mean TPOT", found.mean_per_gpu, "req/s/GPU", how=said),
        ]
    if study.others:
        rival = best(best(value) for value in study.others.values())
        rows += compared(study, ours, rival, "policy", "the best other policy", 1.0, f"{rival.task.policy}, {rival.task.shape}")
    return rows + compared(study, ours, chunked, "colocated", "tuned chunked prefill", None, str(chunked.task.shape))


def compared(study: Study, ours: Found, rival: Found, kind: str, whom: str, bar: float | None, peer: str) -> list[Row]:
    name, claim = study.workload.name, f"{study.workload.title}: goodput / {whom}"
    how = f"ours on {ours.task.shape}"
    plain, mean = ratio(ours.per_gpu, rival.per_gpu), ratio(ours.mean_per_gpu, rival.mean_per_gpu)
    return [
        Row(f"{name}.vs_{kind}", claim, plain, "x", bar, peer=peer, how=how),
        Row(f"{name}.vs_{kind}.mean", f"{claim}, by mean TPOT", mean, "x", peer=peer, how=how),
    ]


def means(rows: Sequence[Row]) -> list[Row]:
    found = []
    for kind, whom, bar in (("policy", "the best other policy", 1.1), ("colocated", "tuned chunked prefill", 1.3)):
        for suffix, text in (("", ""), (".mean", ", by mean TPOT")):
            each = [row.measured for row in rows if row.id.endswith(f".vs_{kind}{suffix}")]
            claim = f"geometric mean of {len(each)}: goodput / {whom}{text}"
            found.append(Row(f"mean.vs_{kind}{suffix}", claim, geometric_mean(each), "x", None if suffix else bar, peer=whom))
    return found


def loose_rows(runner: Runner, workload: Workload, data: Path | None, quick: bool, effort: Effort) -> list[Row]:
    study = studied(runner, workload, data, quick, effort, (LOOSE, LOOSE))
    ours, chunked = best(study.ours), best(study.chunked)
    plain = compared(study, ours, chunked, "colocated", "tuned chunked prefill", None, str(chunked.task.shape))[0]
    claim = f"{plain.claim}, limits {LOOSE:g} x either"
    return [replace(plain, id=f"{workload.name}.loose", claim=claim, how=f"{plain.how}; {study.limits}")]


def draw(study: Study, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    gpus = MACHINES * 4
    shown = [("goodput", best(study.ours)), ("chunked prefill", best(study.chunked))]
    shown += [(name, best(found)) for name, found in study.others.items()]
    lines = [
        Line(label, [(rate / gpus, joint) for rate, joint, *_ in found.points], thin=number > 1)
        for number, (label, found) in enumerate(shown)
    ]
    draw_lines(lines, study.workload.title, str(study.limits), SHARE, str(folder / f"simulated_{study.workload.name}.png"))
    splits = [one for one in study.ours if not one.task.shape.colocated]
    cells = {(one.task.shape.prefill, one.task.shape.decode): 0.0 for one in splits}
    for one in splits:
        key = (one.task.shape.prefill, one.task.shape.decode)
        cells[key] = max(cells[key], one.per_gpu)
    grid(cells, f"{study.workload.title}: req/s/GPU").savefig(folder / f"simulated_{study.workload.name}_pools.png")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", help="which workloads, separated by commas")
    parser.add_argument("--medium", action="store_true", help="short excerpts, every policy: 20 minutes for all traces")
    parser.add_argument("--loose", action="store_true", help="also with limits of 5 x, as without --quick and --medium")
    parser.add_argument("--skip", type=int, default=0, metavar="N", help="excerpts begin after the first N requests of a trace")
    parser.add_argument("--plots", type=Path, help="a folder for pictures of attainment against rate")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
    workloads = WORKLOADS if options.data else (COPIED_WORKLOAD,)
    wanted = set(options.only.split(",")) if options.only else {one.name for one in workloads}
    effort = EFFORTS["quick" if options.quick else "medium" if options.medium else "whole"]
    short = options.quick or options.medium
    rows: list[Row] = []
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        runner = Runner(pool)
        for workload in (replace(one, skip=options.skip) for one in workloads if one.name in wanted):
            recorded = rate_of(excerpt(workload, options.data, short))
            say(f"{workload.title}: recorded at {recorded:.3g}/s")
            study = studied(runner, workload, options.data, short, effort, (TTFT_SLACK, TBT_SLACK))
            against_policies(runner, study, effort.others)
            rows += rows_of(study)
            if options.loose or not short:
                rows += loose_rows(runner, workload, options.data, short, effort)
            if options.plots:
                draw(study, options.plots)
    report([*rows, *means(rows)], options.json)


if __name__ == "__main__":
    main()
