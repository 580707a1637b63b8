"""What the router knows of its cluster: the last snapshot, and what its own requests occupy since. Values."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import NamedTuple

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
    sequence: int = 0
    """Of its report, growing within an epoch; 0: not known."""

    def is_before(self, other: WorkerView) -> bool:
        """Whether `other` is the later word of the two, or of a later incarnation. What the controller itself says of an
        incarnation (dead, draining) counts whatever the number."""
        if self.epoch == other.epoch and self.state in (WorkerState.DEAD, WorkerState.DRAINING):
            return False
        return (self.epoch, self.sequence) < (other.epoch, other.sequence)


@dataclass(frozen=True, slots=True)
class ClusterView:
    """An immutable snapshot; a later one replaces it whole."""

    version: int = 0
    workers: Mapping[str, WorkerView] = field(default_factory=lambda: MappingProxyType({}))
    link: LinkCost = ASSUMED_LINK
    """Over which hand-offs go."""
    received_at: float = 0.0
    """On the router's clock: since then all ages have grown."""

    def keeping(self, old: ClusterView, connected: frozenset[str], now: float) -> ClusterView:
        """This snapshot, received `now`, with what `old` knew better of connected workers: those that are not named (a new
        controller has yet to hear from them, and serving goes on meanwhile), and those of whom it has an older report."""
        elapsed_s = max(now - old.received_at, 0.0)
        kept = {
            name: replace(known, age_s=known.age_s + elapsed_s)
            for name in connected
            if (known := old.workers.get(name)) is not None
            and ((new := self.workers.get(name)) is None or new.is_before(known))
        }
        return replace(self, workers=MappingProxyType({**self.workers, **kept}), received_at=now)

    def stale_at(self, stale_after_s: float, now: float) -> float:
        """When the next report that is not stale by `now` becomes it; infinity when there is none."""
        serving = (worker.age_s for worker in self.workers.values() if worker.role in SERVING_ROLES)
        return min((at for age_s in serving if (at := self.received_at + stale_after_s - age_s) >= now), default=math.inf)

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


class Held(NamedTuple):
    """What this router's journeys occupy on one worker.

    Prompts there or on their way: how many, their tokens, and the sum of the squares of those, which their attention grows
    with; the first of them, of `first_tokens`, is at work since `since`. `running` requests hold `context_tokens`; of them
    `coming` still have their prompts computed elsewhere, which have `coming_tokens`.
    """

    prefills: int = 0
    prefill_tokens: int = 0
    prefill_squares: int = 0
    since: float = 0.0
    running: int = 0
    context_tokens: int = 0
    coming: int = 0
    coming_tokens: int = 0
    first_tokens: int = 0


NOTHING = Held()


class Claims:
    """This router's own in-flight work by worker, newer than any report: a burst does not herd onto one worker."""

    def __init__(self) -> None:
        self._held: dict[str, Held] = {}
        self._prompts: dict[str, deque[int]] = {}  # of each worker in turn, by their tokens

    def swap(self, old: Claim, new: Claim, now: float = 0.0) -> None:
        """A journey left `old` and occupies `new`."""
        self._add(old, -1, now)
        self._add(new, +1, now)

    def held(self, worker: str) -> Held:
        return self._held.get(worker, NOTHING)

    def all_held(self) -> Mapping[str, Held]:
        """As it is now."""
        return dict(self._held)

    def prefill_tokens(self, worker: str) -> int:
        return self.held(worker).prefill_tokens

    def prefills(self, worker: str) -> int:
        return self.held(worker).prefills

    def running(self, worker: str) -> int:
        return self.held(worker).running

    def context_tokens(self, worker: str) -> int:
        return self.held(worker).context_tokens

    def is_empty(self) -> bool:
        return not self._held

    def _add(self, claim: Claim, sign: int, now: float) -> None:
        tokens = claim.prefill_tokens
        if claim.prefill is not None:
            held, line = self.held(claim.prefill), self._prompts.setdefault(claim.prefill, deque())
            assert sign > 0 or tokens in line, "a claim was given back twice"
            at_work = len(line) > (sign < 0) and (sign > 0 or line[0] != tokens)  # the first one still is
            if sign > 0:
                line.append(tokens)
            else:
                line.remove(tokens)  # the first of them where several are alike: they take the same
            if not line:
                del self._prompts[claim.prefill]
            self._keep(
                claim.prefill,
                held._replace(
                    prefills=held.prefills + sign,
                    prefill_tokens=held.prefill_tokens + sign * tokens,
                    prefill_squares=held.prefill_squares + sign * tokens * tokens,
                    since=held.since if at_work else now,
                    first_tokens=line[0] if line else 0,
                ),
            )
        if claim.decode is not None:
            held, comes = self.held(claim.decode), sign * (claim.prefill is not None and claim.prefill != claim.decode)
            self._keep(
                claim.decode,
                held._replace(
                    running=held.running + sign,
                    context_tokens=held.context_tokens + sign * claim.context_tokens,
                    coming=held.coming + comes,
                    coming_tokens=held.coming_tokens + comes * tokens,
                ),
            )

    def _keep(self, worker: str, held: Held) -> None:
        assert min(held.prefills, held.prefill_tokens, held.running, held.coming) >= 0, "a claim was given back twice"
        if held.prefills or held.running:
            self._held[worker] = held
        else:
            self._held.pop(worker, None)
