"""Everything that the simulator and the planner are held to, as one script: runs the scripts below, one after another.

| script | what it says |
|---|---|
| `simulator_roofline` | rooflines against engines that somebody measured |
| `simulator_splitwise` | Splitwise's stored example, runs and provisioning |
| `simulator_papers` | VTC's bound, FastServe's toy example, SpotServe's configurations |
| `simulator_distserve` | DistServe's attainment table and placements, the closed forms of queueing |
| `simulator_cache` | block-cache hit ratios by capacity on Mooncake's traces |
| `simulator_mooncake` | Mooncake's scheduling ablation and its order of early rejection |
| `simulator_speed` | events a second, wall time of large workloads, other simulators |
| `simulator_fidelity` | real processes beside the simulation of them |
| `simulator_goodput` | goodput of policies on the traces, against chunked prefill |
| `simulator_spot` | goodput per dollar on spot instances as recorded |

With --quick goodput looks at one workload (QUICK_ONLY), its own --quick at all of them.
Each is a script of its own, with its claims at its top; one that is not there yet, fails or is not done in time is a row
without a figure. What is timed runs alone, the others two at a time.

    python -m benchmarks.simulator [--quick] [--data DIR] [--json FILE] [--only NAME ...]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from benchmarks.rows import Row, arguments, report

TIMED = ("speed", "fidelity")
TOGETHER = ("goodput", "spot", "splitwise", "mooncake", "distserve", "cache", "papers", "roofline")
"""The longest first, so that both cores are done at about the same time."""
QUICK_ONLY = {"goodput": ["--only", "azure_conv"]}
"""What --quick runs of the longest: one workload of five."""
QUICK_S, WHOLE_S = 285.0, 4 * 3600.0
"""How long all of them may take."""


def rows_of(part: str, data: Path | None, quick: bool, folder: Path, until: float) -> list[Row]:
    """Runs one script, until that time of the monotonic clock. Its failure is a row, with the end of what it said."""
    module, written = f"benchmarks.simulator_{part}", folder / f"{part}.json"
    if find_spec(module) is None:
        return [Row(f"simulator.{part}", f"{module} is not there yet", None, "")]
    command = [sys.executable, "-m", module, "--json", str(written)]
    command += ["--quick", *(QUICK_ONLY.get(part, []) if data else [])] if quick else []
    command += ["--data", str(data)] if data else []
    started = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(until - started, 1.0), check=False)
        said = (done.stderr or done.stdout)[-400:]
    except subprocess.TimeoutExpired:
        said = f"not done after {time.monotonic() - started:.0f} s"
    print(f"{module}: {time.monotonic() - started:.0f} s", file=sys.stderr)
    if not written.exists():
        return [Row(f"simulator.{part}", f"{module} gave no figures", None, "", how=said)]
    return [Row(**row) for row in json.loads(written.read_text())]


def collect(parts: Sequence[str], data: Path | None, quick: bool) -> Iterator[Row]:
    until = time.monotonic() + (QUICK_S if quick else WHOLE_S)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        for part in (part for part in TIMED if part in parts):
            yield from rows_of(part, data, quick, Path(folder), until)
        chosen = [part for part in TOGETHER if part in parts]
        for rows in pool.map(lambda part: rows_of(part, data, quick, Path(folder), until), chosen):
            yield from rows


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--only", nargs="+", choices=(*TIMED, *TOGETHER), help="run these scripts alone")
    args = parser.parse_args()
    report(collect(args.only or (*TIMED, *TOGETHER), args.data, args.quick), args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
