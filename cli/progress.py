"""Progress of a starting cluster on a terminal; nothing at all elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.report import ClusterSnapshot


class StartProgress:
    """A bar per worker on standard error until `stop`. Without a terminal it only passes log lines on."""

    def __init__(self, wanted: bool) -> None:
        self._bars: dict[str, Any] = {}
        self._progress: Any = None
        if wanted:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("[bold]{task.description:<12}"),
                BarColumn(24),
                TextColumn("{task.fields[detail]}"),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )

    def __enter__(self) -> StartProgress:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def show(self, snapshot: ClusterSnapshot) -> None:
        if self._progress is None:
            return
        for member in snapshot.members:
            report = member.report
            if report.worker_id not in self._bars:
                self._bars[report.worker_id] = self._progress.add_task(report.worker_id, total=1.0, detail="")
            done = 1.0 if report.state.value == "ready" else report.progress
            detail = report.state.value if report.state.value != "starting" else report.detail or "starting"
            self._progress.update(self._bars[report.worker_id], completed=done, detail=detail)

    def log_line(self, line: str) -> None:
        """A line of a child process' log."""
        sys.stderr.write(line + "\n")
