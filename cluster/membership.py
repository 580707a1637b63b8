"""Who belongs to the cluster and what each last said. Deciding only: time and reports come as arguments."""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import itemgetter

from cluster.report import ClusterSnapshot, Member
from core.errors import StaleEpochError
from core.report import WorkerReport, WorkerState
from core.request import WorkerRole


@dataclass(slots=True)
class _Entry:
    report: WorkerReport
    heard_at: float
    suspected: bool = False
    draining: bool = False  # asked for here; the worker's own reports may still say ready for a moment


class Membership:
    """A table of the newest report of each worker, by (epoch, sequence).

    Every change that a reader could care about raises `version`; a mere heartbeat does not. A worker that has been
    ready and falls silent is suspected after `suspect_after_s` and dead after `dead_after_s`. While it starts, silence
    means nothing (loading a model may block its loop); the reconciler's start timeout watches over that.
    """

    def __init__(self, suspect_after_s: float, dead_after_s: float) -> None:
        assert 0 < suspect_after_s <= dead_after_s
        self._suspect_after_s = suspect_after_s
        self._dead_after_s = dead_after_s
        self._entries: dict[str, _Entry] = {}
        self._ticked_at: float | None = None
        self.version = 0

    def expect(self, worker_id: str, role: WorkerRole, epoch: int, node: str, now: float) -> None:
        """An incarnation was launched: it is shown as starting, and everything from before it is refused."""
        report = WorkerReport(worker_id, role, epoch, node=node, detail="launching")
        self._put(report, now)

    def report(self, report: WorkerReport, now: float) -> bool:
        """Takes a report in; True when it changed what readers see.

        Raises StaleEpochError for an older epoch and for one already declared dead: such a worker must end. An older
        sequence of the same epoch is ignored. Unknown workers are welcome, so that a restarted controller learns them.
        """
        entry = self._entries.get(report.worker_id)
        if entry is None:
            self._put(report, now)
            return True
        known = entry.report
        if report.epoch < known.epoch:
            raise StaleEpochError(f"{report.worker_id} epoch {report.epoch} was superseded by epoch {known.epoch}")
        if report.epoch == known.epoch:
            if known.state is WorkerState.DEAD:
                raise StaleEpochError(f"{report.worker_id} epoch {report.epoch} was declared dead: {known.detail}")
            if report.sequence <= known.sequence:
                return False
        if entry.draining and report.epoch == known.epoch and report.state is WorkerState.READY:
            report = replace(report, state=WorkerState.DRAINING)
        changed = entry.suspected or not report.says_as(known)
        entry.report, entry.heard_at, entry.suspected = report, now, False
        entry.draining = entry.draining and report.epoch == known.epoch
        self.version += changed
        return changed

    def mark_dead(self, worker_id: str, epoch: int, reason: str) -> None:
        """This incarnation is gone; a newer one is left alone."""
        entry = self._entries.get(worker_id)
        if entry is not None and entry.report.epoch == epoch and entry.report.state is not WorkerState.DEAD:
            entry.report = replace(entry.report, state=WorkerState.DEAD, detail=reason, running=0, waiting=0, leases_open=0)
            entry.suspected = False
            self.version += 1

    def mark_draining(self, worker_id: str) -> None:
        """Shown as draining at once, so that routers avoid it before its own report says so."""
        entry = self._entries.get(worker_id)
        if entry is not None and entry.report.state is WorkerState.READY:
            entry.report, entry.draining = replace(entry.report, state=WorkerState.DRAINING), True
            self.version += 1

    def forget(self, worker_id: str) -> None:
        if self._entries.pop(worker_id, None) is not None:
            self.version += 1

    def tick(self, now: float) -> list[tuple[str, int]]:
        """Judges silence. Returns the (worker_id, epoch) that became dead by it, each once. To be called steadily: time in
        which it was not called (this process was stopped, its machine suspended) is nobody's silence."""
        self._forgive_own_absence(now)
        silent = []
        for worker_id, entry in self._entries.items():
            if entry.report.state not in (WorkerState.READY, WorkerState.DRAINING):
                continue
            quiet_s = now - entry.heard_at
            if quiet_s >= self._dead_after_s:
                silent.append((worker_id, entry.report.epoch))
            elif quiet_s >= self._suspect_after_s and not entry.suspected:
                entry.suspected = True
                self.version += 1
        for worker_id, epoch in silent:
            self.mark_dead(worker_id, epoch, f"silent for {self._dead_after_s:g} s")
        return silent

    def _forgive_own_absence(self, now: float) -> None:
        last, self._ticked_at = self._ticked_at, now
        if last is not None and now - last >= self._suspect_after_s:
            for entry in self._entries.values():  # their reports wait to be read, or could not be sent
                entry.heard_at = min(now, entry.heard_at + now - last)

    def snapshot(self, now: float, model: str = "", tandem_version: str = "") -> ClusterSnapshot:
        members = tuple(
            Member(entry.report, max(0.0, now - entry.heard_at), entry.suspected)
            for _, entry in sorted(self._entries.items(), key=itemgetter(0))
        )
        return ClusterSnapshot(self.version, members, model, tandem_version)

    def _put(self, report: WorkerReport, now: float) -> None:
        self._entries[report.worker_id] = _Entry(report, now)
        self.version += 1
