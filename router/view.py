"""What the router knows of its cluster: the last snapshot, and what its own requests occupy since. Values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from core.blocks import KvLayout
from core.cost_model import LinkCost, StepCost
from core.report import WorkerState
from core.request import WorkerRole

SERVING_ROLES = frozenset({WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.COLOCATED})


ASSUMED_LINK = LinkCost(latency_s=1e-3, bytes_per_s=2e9)
"""Of a hand-off where none was measured: shared memory is quicker, a network slower."""


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker as it last reported, `age_s` before the snapshot was taken."""

    worker_id: str
    role: WorkerRole
    epoch: int
    state: WorkerState
    address: str
    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    context_tokens: int = 0
    """Held by its running requests."""
    step_cost: StepCost | None = None
    """What it learned of its own steps."""
    blocks_total: int = 0
    blocks_free: int = 0
    blocks_cached: int = 0
    age_s: float = 0.0
    layout: KvLayout | None = None
    model_name: str = ""
    model_path: str = ""
    max_model_len: int = 0
    vocab_size: int = 0


@dataclass(frozen=True, slots=True)
class ClusterView:
    """An immutable snapshot; a later one replaces it whole."""

    version: int = 0
    workers: Mapping[str, WorkerView] = field(default_factory=lambda: MappingProxyType({}))
    link: LinkCost = ASSUMED_LINK
    """Over which hand-offs go."""

    def keeping(self, old: ClusterView, connected: frozenset[str]) -> ClusterView:
        """Adds what `old` knew of connected workers that this snapshot does not name: a new controller has yet to hear
        from them, and serving goes on meanwhile."""
        kept = {name: old.workers[name] for name in connected if name in old.workers and name not in self.workers}
        return replace(self, workers=MappingProxyType({**self.workers, **kept})) if kept else self

    def serving(self) -> list[WorkerView]:
        """Workers that should have a session: prefill, decode or colocated, ready or finishing what they have."""
        alive = (WorkerState.READY, WorkerState.DRAINING)
        return [w for w in self.workers.values() if w.role in SERVING_ROLES and w.state in alive]


@dataclass(frozen=True, slots=True)
class Claim:
    """What one journey occupies: a prompt being computed on `prefill`, a running request on `decode` that held
    `context_tokens` when it was placed."""

    prefill: str | None = None
    prefill_tokens: int = 0
    decode: str | None = None
    context_tokens: int = 0


NO_CLAIM = Claim()


class Claims:
    """This router's own in-flight work by worker, newer than any report: a burst does not herd onto one worker."""

    def __init__(self) -> None:
        self._prefill_tokens: dict[str, int] = {}
        self._prefills: dict[str, int] = {}
        self._running: dict[str, int] = {}
        self._context: dict[str, int] = {}

    def swap(self, old: Claim, new: Claim) -> None:
        """A journey left `old` and occupies `new`."""
        self._add(old, -1)
        self._add(new, +1)

    def prefill_tokens(self, worker: str) -> int:
        return self._prefill_tokens.get(worker, 0)

    def prefills(self, worker: str) -> int:
        return self._prefills.get(worker, 0)

    def running(self, worker: str) -> int:
        return self._running.get(worker, 0)

    def context_tokens(self, worker: str) -> int:
        return self._context.get(worker, 0)

    def is_empty(self) -> bool:
        return not (self._prefill_tokens or self._prefills or self._running or self._context)

    def _add(self, claim: Claim, sign: int) -> None:
        if claim.prefill is not None:
            _count(self._prefill_tokens, claim.prefill, sign * claim.prefill_tokens)
            _count(self._prefills, claim.prefill, sign)
        if claim.decode is not None:
            _count(self._running, claim.decode, sign)
            _count(self._context, claim.decode, sign * claim.context_tokens)


def _count(table: dict[str, int], worker: str, amount: int) -> None:
    total = table.get(worker, 0) + amount
    assert total >= 0, "a claim was given back twice"
    if total:
        table[worker] = total
    else:
        table.pop(worker, None)
