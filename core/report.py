"""What workers, routers and stores say of themselves, as one value: it goes up to the controller and on to all who watch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import Enum
from operator import attrgetter
from typing import NamedTuple

from core.blocks import KvLayout
from core.cost_model import Fit
from core.inventory import BlockCounts
from core.request import WorkerRole


class WorkerState(Enum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


class ModelFacts(NamedTuple):
    """What a router needs to know of the model that is served."""

    name: str = ""
    max_model_len: int = 0
    vocab_size: int = 0
    path: str = ""


class RoleProposal(NamedTuple):
    """A router's view: `target` would be of more use as `role`."""

    target: str
    role: WorkerRole
    reason: str


class Demand(NamedTuple):
    """What one router was asked for since it started; every number only grows. Lengths are of requests that were answered."""

    requests: int = 0
    """That came, whatever became of them."""
    answered: int = 0
    prompt_tokens: int = 0
    prompt_squares: float = 0.0
    """Sum of squared lengths."""
    cached_tokens: int = 0
    """Of the prompt tokens: not computed, because their KV was there."""
    answer_tokens: int = 0
    answer_squares: float = 0.0


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
    """Prompt tokens not yet computed."""
    context_tokens: int = 0
    """Held by its running sequences."""
    step_cost: Fit | None = None
    """What its steps cost, once it has seen enough of them."""
    layout: KvLayout | None = None
    model: ModelFacts | None = None
    proposal: RoleProposal | None = None
    """Of routers."""
    demand: Demand | None = None
    """Of routers."""
    peer_address: str = ""
    """Of routers that share their `grpc_address`: where this one alone answers."""
    progress: float = 0.0
    """Of starting, 0 to 1."""
    detail: str = ""
    """What it is doing while it starts, or why it died."""

    def says_as(self, other: WorkerReport) -> bool:
        """Whether the two say the same, whatever their numbers."""
        return bool(_SAID(self) == _SAID(other))

    @property
    def idle(self) -> bool:
        """Nothing runs, waits, or is still being read by another worker."""
        return not (self.running or self.waiting or self.leases_open)


_SAID = attrgetter(*(field.name for field in fields(WorkerReport) if field.name != "sequence"))
