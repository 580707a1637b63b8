"""Everything a policy may look at when it places a request. Deciding code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from core.blocks import BlockKey, KvLayout, block_keys, root_key
from core.cost_model import StepCost
from core.report import WorkerState
from core.request import WorkerRole
from router.block_index import BlockIndex
from router.calibration import Calibration
from router.cost_columns import Column, typical_cost
from router.key_runs import PromptKeys
from router.pools import Pool
from router.view import Claim, Claims, ClusterView, Held, WorkerView

NOBODY: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Situation:
    """`connected`: workers whose session is up. `index`: who has which blocks, where somebody keeps one.

    Made anew when the view or the sessions change; `moved` keeps it true while claims change in between.
    """

    view: ClusterView
    connected: frozenset[str]
    claims: Claims
    index: BlockIndex | None = None
    stale_after_s: float = float("inf")
    seen_at: float = 0.0
    """When its reports came; what we held then is `then`."""
    calibration: Calibration | None = None
    older_s: float = 0.0
    """By how much the reports have aged since they came."""
    then: Mapping[str, Held] | None = None
    """Left out: what we hold now."""
    fetches: bool = True
    """Whether workers fetch blocks that others have."""

    def __post_init__(self) -> None:
        if self.then is None:
            object.__setattr__(self, "then", self.claims.all_held())

    def candidates(self, role: WorkerRole, avoid: frozenset[str] = NOBODY) -> list[WorkerView]:
        """Connected, ready workers of a role, in a fixed order."""
        return [worker for worker in self._ready if worker.role is role and worker.worker_id not in avoid]

    @cached_property
    def _ready(self) -> list[WorkerView]:
        known = self.view.workers
        found = (known[name] for name in sorted(self.connected & known.keys()))
        return [worker for worker in found if worker.state is WorkerState.READY]

    @cached_property
    def prefill(self) -> Pool:
        return self._pool(WorkerRole.PREFILL)

    @cached_property
    def decode(self) -> Pool:
        return self._pool(WorkerRole.DECODE)

    @cached_property
    def whole(self) -> Pool:
        return self._pool(WorkerRole.COLOCATED)

    def prepare(self) -> None:
        """Makes the pools now, before a request waits for them: half a millisecond on a machine that idles."""
        self.prefill, self.decode, self.whole  # noqa: B018

    @property
    def token_bytes(self) -> int:
        """KV of one token, 0 before anybody has said."""
        return self._layout.token_bytes if self._layout is not None else 0

    @cached_property
    def _layout(self) -> KvLayout | None:
        layouts = (worker.layout for worker in self.view.workers.values())
        return next((layout for layout in layouts if layout is not None), None)

    def prompt_keys(self, prompt: Sequence[int], cache_salt: bytes) -> tuple[BlockKey, ...]:
        """Keys of the prompt's full blocks, as workers make them; none before a worker has named its layout."""
        if self._layout is None:
            return ()
        return PromptKeys(block_keys(root_key(self._layout.fingerprint, cache_salt), prompt, self._layout.block_size))

    def cached_blocks(self, pool: Pool, keys: Sequence[BlockKey]) -> Column:
        """Of a prompt's blocks, how many each worker of the pool has in memory, without a gap, as far as the index knows."""
        if self.index is None or not keys:
            return np.zeros(len(pool))
        return pool.of_slots(self.index.match(keys).depths, self.index)

    def best_tokens(self, keys: Sequence[BlockKey], tokens: int) -> int:
        """Of a prompt of so many tokens, what can be fetched; one is always computed."""
        if self.index is None or self._layout is None or not self.fetches or not keys:
            return 0
        return min(self.index.match(keys).best * self._layout.block_size, tokens - 1)

    def moved(self, *claims: Claim) -> None:
        """The claims that a journey gave back or took."""
        names = {name for claim in claims for name in (claim.prefill, claim.decode) if name is not None}
        for pool in ("prefill", "decode", "whole"):
            if pool in self.__dict__:  # made already
                getattr(self, pool).refresh(names)

    @cached_property
    def costs_known(self) -> bool:
        """Without any measured step, predictions rank places but say nothing of limits."""
        return any(worker.step_cost is not None for worker in self.view.workers.values())

    @cached_property
    def _typical(self) -> StepCost | None:
        return typical_cost(self.view.workers.values())

    def _pool(self, role: WorkerRole) -> Pool:
        workers, stale_after_s = self.candidates(role), self.stale_after_s - self.older_s
        return Pool(workers, self.claims, stale_after_s, self.then, self.seen_at, self.calibration, lambda: self._typical)
