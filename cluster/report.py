"""Facts that workers send up and the cluster passes on, as values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from core.blocks import KvLayout
from core.inventory import BlockCounts
from core.request import WorkerRole


class WorkerState(Enum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


class ModelInfo(NamedTuple):
    name: str = ""
    max_model_len: int = 0
    vocab_size: int = 0
    path: str = ""


NO_BLOCKS = BlockCounts(0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """What one incarnation says of itself. `sequence` grows with every report of an epoch."""

    worker_id: str
    role: WorkerRole
    epoch: int
    sequence: int = 0
    state: WorkerState = WorkerState.STARTING
    pid: int = 0
    node: str = ""
    host_id: str = ""
    grpc_address: str = ""
    metrics_address: str = ""
    http_address: str = ""
    blocks: BlockCounts = NO_BLOCKS
    leases_open: int = 0
    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    layout: KvLayout | None = None
    model: ModelInfo | None = None
    progress: float = 0.0
    detail: str = ""

    @property
    def idle(self) -> bool:
        """Nothing runs, waits, or is still being read by another worker."""
        return not (self.running or self.waiting or self.leases_open)


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
