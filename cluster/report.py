"""What the cluster passes on of its workers, as values."""

from __future__ import annotations

from dataclasses import dataclass

from core.report import WorkerReport


@dataclass(frozen=True, slots=True)
class Member:
    """A report and how old it is. `suspected`: silent for so long that new work should go elsewhere."""

    report: WorkerReport
    age_s: float = 0.0
    suspected: bool = False


@dataclass(frozen=True, slots=True)
class ClusterSnapshot:
    """The whole cluster at one version; a higher version is newer."""

    version: int
    members: tuple[Member, ...] = ()
    model: str = ""
    tandem_version: str = ""

    def find(self, worker_id: str) -> WorkerReport | None:
        return next((m.report for m in self.members if m.report.worker_id == worker_id), None)
