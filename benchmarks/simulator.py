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
| `simulator_goodput` | goodput of policies and of spot capacity on the traces |

Each is a script of its own, with its claims at its top; one that is not there yet, or fails, is a row without a figure.

    python -m benchmarks.simulator [--quick] [--data DIR] [--json FILE] [--only NAME ...]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from benchmarks.rows import Row, arguments, report

PARTS = ("roofline", "papers", "cache", "distserve", "splitwise", "mooncake", "speed", "fidelity", "goodput")
QUICK_S, WHOLE_S = 280, 7200
"""How long one script may take."""


def rows_of(part: str, data: Path | None, quick: bool, folder: Path) -> list[Row]:
    """Runs one script. Its failure is a row, with the end of what it said."""
    module, written = f"benchmarks.simulator_{part}", folder / f"{part}.json"
    if find_spec(module) is None:
        return [Row(f"simulator.{part}", f"{module} is not there yet", None, "")]
    command = [sys.executable, "-m", module, "--json", str(written)]
    command += ["--quick"] if quick else []
    command += ["--data", str(data)] if data else []
    limit_s, started = QUICK_S if quick else WHOLE_S, time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
        said = (done.stderr or done.stdout)[-400:]
    except subprocess.TimeoutExpired:
        said = f"not done after {limit_s} s"
    print(f"{module}: {time.monotonic() - started:.0f} s", file=sys.stderr)
    if not written.exists():
        return [Row(f"simulator.{part}", f"{module} failed", None, "", how=said)]
    return [Row(**row) for row in json.loads(written.read_text())]


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, help="run these scripts alone")
    args = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for part in args.only or PARTS:
            rows += rows_of(part, args.data, args.quick, Path(folder))
    report(rows, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
