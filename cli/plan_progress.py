"""How far a plan is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from cli.progress import Bar

LINE_EVERY_S = 10.0
"""Without a terminal; a plan that is done before says nothing."""


class PlanProgress:
    """Hears of each simulation before it begins (`begin`) and of time passing in one (`tick`), on standard error.

    What is left is the mean time of a simulation, times how many there will be, about: it is said as soon as one has ended.
    """

    def __init__(self, wanted: bool, terminal: bool) -> None:
        from rich.progress import TextColumn, TimeElapsedColumn

        self._bar = Bar(wanted and terminal, TimeElapsedColumn(), TextColumn("{task.fields[detail]}"))
        self._lines = wanted and not terminal
        self._began_at = self._ended_at = self._said_at = time.monotonic()
        self._what, self._done, self._left = "", 0, 0

    def __enter__(self) -> PlanProgress:
        self._bar.__enter__()
        self._bar.begin("planning", 1.0)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.__exit__()

    def begin(self, what: str, left: int) -> None:
        """A simulation of `what` begins; with it there will be about `left`."""
        self._ended_at = time.monotonic()
        if self._what:
            self._done += 1
        else:
            self._began_at = self._ended_at
        self._what, self._left = what, left
        self.tick()

    def tick(self) -> None:
        now, done = time.monotonic(), self._done
        how_far = f"simulation {done + 1} of about {done + self._left}"
        if done:
            mean_s = (self._ended_at - self._began_at) / done
            how_far += f", about {_minutes(self._left * mean_s - min(now - self._ended_at, mean_s))} left"
        self._bar.reach(done / (done + self._left), how_far)
        if self._lines and now - self._said_at >= LINE_EVERY_S:
            self._said_at = now
            sys.stderr.write(f"tandem: planning for {_minutes(now - self._began_at)}: {how_far} ({self._what})\n")
            sys.stderr.flush()


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
