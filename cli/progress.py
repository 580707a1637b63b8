"""Progress on a terminal; nothing at all elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import ProgressColumn, Task

    from cluster.report import ClusterSnapshot


class Bar:
    """One bar at a time on standard error, with `columns` of rich's behind it; nothing is shown unless `wanted`."""

    def __init__(self, wanted: bool, *columns: ProgressColumn) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        layout = (TextColumn("{task.description}"), BarColumn(), *columns)
        self._progress = Progress(*layout, console=Console(stderr=True), transient=True, disable=not wanted)
        self._task: Task | None = None

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, what: str, total: float) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task.id)
        self._progress.add_task(what, total=total, detail="")
        self._task = self._progress.tasks[-1]

    def advance(self) -> None:
        if self._task is not None:
            self._progress.advance(self._task.id)

    def tell(self, detail: str) -> None:
        """As far as time has passed, with `detail` for a column of that name."""
        if self._task is not None:
            self._progress.update(self._task.id, completed=self._task.elapsed, detail=detail)

    def reach(self, done: float, detail: str) -> None:
        """As far as `done` of the total, with `detail` for a column of that name."""
        if self._task is not None:
            self._progress.update(self._task.id, completed=done, detail=detail)


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
