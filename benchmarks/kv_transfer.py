"""Everything the KV plane claims about speed, in one table: each part is a script of its own, run here one after the other.

    python -m benchmarks.kv_transfer [--quick] [--only NAME ...] [--json FILE]

A part runs in a process of its own, so that none inherits memory, threads or connections of another. What a part found is
kept when a later one fails; the exit status says so. Rows of peers that are not installed (`python -m benchmarks.peers`)
have `measured` null.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.rows import Row, arguments, report

PARTS = {  # by name: the script
    "shm": "kv_shm",
    "tcp": "kv_tcp",
    "grpc": "kv_grpc",
    "gloo": "kv_collective",
    "ray": "kv_ray",
    "disk": "kv_disk",
    "codecs": "kv_codecs",
    "directory": "kv_directory",
    "reuse": "kv_reuse",
    "connector": "kv_connector",
}
QUICK_S, FULL_S = 240.0, 1800.0  # of one part
STOP_S = 45.0


def rows_of(module: str, quick: bool, folder: Path) -> list[Row]:
    """Runs one script and reads its rows. Raises RuntimeError when it fails or takes too long."""
    path = folder / f"{module}.json"
    command = [sys.executable, "-m", f"benchmarks.{module}", "--json", str(path), *(["--quick"] if quick else [])]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            code = process.wait(QUICK_S if quick else FULL_S)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # it ends what it started
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
            raise RuntimeError(f"it took longer than {QUICK_S if quick else FULL_S:g} s") from None
        except KeyboardInterrupt:  # the part heard of it too
            process.wait(STOP_S)
            raise
    if code or not path.exists():
        raise RuntimeError(f"it ended with status {code}")
    return [Row(**row) for row in json.loads(path.read_text())]


def main() -> None:
    known = [name for name, module in PARTS.items() if importlib.util.find_spec(f"benchmarks.{module}")]
    parser = arguments(__doc__)
    parser.add_argument("--only", nargs="+", choices=known, default=known, help="these parts")
    options = parser.parse_args()
    rows: list[Row] = []
    failed = []
    with TemporaryDirectory() as folder:
        for name in options.only:
            started = time.perf_counter()
            try:
                rows += rows_of(PARTS[name], options.quick, Path(folder))
            except RuntimeError as error:
                failed.append(name)
                print(f"{name}: {error}; python -m benchmarks.{PARTS[name]} shows why", file=sys.stderr)
            print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    report(rows, options.json)
    sys.exit(f"without figures: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
