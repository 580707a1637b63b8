"""What every benchmark prints and writes: rows of claim, measured figure and bar, the machine and the commit beside them."""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. `bar` None: stated, not judged. `measured` None: the peer is not installed."""

    id: str
    claim: str
    measured: float | None
    unit: str
    bar: float | None = None
    direction: Literal[">=", "<="] = ">="
    peer: str = ""
    how: str = ""

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        if self.bar is None:
            return "stated"
        met = self.measured >= self.bar if self.direction == ">=" else self.measured <= self.bar
        return "met" if met else "missed"


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The flags every script has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions: within five minutes on two cores")
    parser.add_argument("--data", type=_data_folder, help="a folder with traces/, profiles/, spot/; copied-in data otherwise")
    return parser


def _data_folder(given: str) -> Path:
    folder = Path(given)
    if not any((folder / name).is_dir() for name in ("traces", "profiles", "spot")):
        raise argparse.ArgumentTypeError(f"{given} has none of traces/, profiles/ and spot/: name the folder above them")
    return folder


def machine() -> str:
    cpus = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = cpus[0].partition(":")[2].strip() if cpus else platform.processor()
    return f"{len(cpus)} x {name}, Python {platform.python_version()}"


def commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def report(rows: Iterable[Row], json_path: Path | None) -> None:
    """Prints the table and, when asked, writes the rows, and beside them what was run when and where (`NAME.run.json`)."""
    rows = list(rows)
    table = Table(caption=f"{machine()} · commit {commit()}", caption_justify="left")
    for title, justify in (("figure", "left"), ("measured", "right"), ("bar", "right"), ("", "left"), ("against", "left")):
        table.add_column(title, justify=justify)  # type: ignore[arg-type]
    colours = {"met": "green", "missed": "red"}
    for row in rows:
        shown = "—" if row.measured is None else f"{row.measured:.4g} {row.unit}"
        bar = "" if row.bar is None else f"{row.direction} {row.bar:.4g}"
        verdict = row.verdict
        table.add_row(row.claim, shown, bar, f"[{colours.get(verdict, 'dim')}]{verdict}[/]", row.peer)
    Console(width=150).print(table)
    if json_path:
        json_path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
        json_path.with_suffix(".run.json").write_text(json.dumps(run_of(sys.argv), indent=1) + "\n")


def run_of(argv: Sequence[str]) -> dict[str, str]:
    """The command that measures this again, the commit, the machine and the day. Of paths only the last part is told: where
    somebody keeps traces is nobody else's business."""
    words = [Path(word).name if word.startswith("/") else word for word in argv[1:]]
    return {
        "command": shlex.join(["python", "-m", f"benchmarks.{Path(argv[0]).stem}", *words]),
        "commit": commit(),
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
    }
