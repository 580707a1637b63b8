"""The cost model that `router.cost_model` names: believed of workers that have learned nothing yet, and watched. Deciding code.

Workers learn what their own steps cost and report it; what they learned counts. When it departs from the file for long, the
file is wrong for this machine, and whoever plans by it should know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from core.cost_file import check_fingerprint
from core.cost_model import CostModel, Drift, StepShape, pairs
from core.request import WorkerRole
from router.view import ClusterView, WorkerView

DRIFT_MAX = 1.5
"""Observed over predicted, or the other way round, beyond which a worker's steps have departed from the file."""
DRIFT_HOLD_S = 30.0
"""For how long, before it is said."""
CHUNK_TOKENS = 256
"""Of the prompt by which prefill is compared."""


@dataclass(slots=True)
class _Watched:
    epoch: int
    drift: Drift
    away_since: float | None = None
    said: bool = False


@dataclass(slots=True)
class Prior:
    """`path` is for messages. `transport`: the configured one, which says the link of a hand-off; `auto` on one host is shm."""

    model: CostModel
    path: str
    transport: str = "auto"
    _watched: dict[str, _Watched] = field(default_factory=dict)

    def check(self, view: ClusterView) -> None:
        """Raises ConfigError when a worker serves another model than the file was measured on."""
        for worker in view.workers.values():
            if worker.layout is not None:
                check_fingerprint(self.model, self.path, worker.layout.fingerprint.hex(), worker.model_name or worker.worker_id)

    def under(self, view: ClusterView) -> ClusterView:
        """The view with this cost for workers that have not learned theirs."""
        workers = {
            name: worker if worker.step_cost is not None else replace(worker, step_cost=self.model.steps)
            for name, worker in view.workers.items()
        }
        link = self.model.links.get("shm" if self.transport == "auto" else self.transport)
        return replace(view, workers=MappingProxyType(workers), link=link or view.link)

    def watch(self, now: float, view: ClusterView) -> list[str]:
        """Takes in what workers learned (`view` as it was reported) and returns what there is to say of it, each once."""
        self._watched = {name: watched for name, watched in self._watched.items() if name in view.workers}
        said = []
        for name, worker in view.workers.items():
            if worker.step_cost is None:
                continue
            shape = typical_step(worker)
            if shape is None:
                continue
            watched = self._watched.get(name)
            if watched is None or watched.epoch != worker.epoch:
                watched = self._watched[name] = _Watched(worker.epoch, Drift(self.model.steps))
            watched.drift.observe(shape, worker.step_cost.step_s(shape))
            said += self._judge(now, name, watched)
        return said

    @property
    def factors(self) -> Mapping[str, float]:
        """By worker: the time of its typical step as it learned it, over what the file says."""
        return {name: watched.drift.factor for name, watched in self._watched.items()}

    def _judge(self, now: float, name: str, watched: _Watched) -> list[str]:
        factor = watched.drift.factor
        if 1 / DRIFT_MAX <= factor <= DRIFT_MAX:
            watched.away_since = None
            if not watched.said:
                return []
            watched.said = False
            return [f"steps of {name} take what {self.path} says again"]
        if watched.away_since is None:
            watched.away_since = now
        if watched.said or now - watched.away_since < DRIFT_HOLD_S:
            return []
        watched.said = True
        return [
            f"steps of {name} have taken {factor:.2f} x what {self.path} says for {DRIFT_HOLD_S:g} s; placement follows what "
            f"it learned, but plans made with the file do not: measure again with `tandem profile --json {self.path}`"
        ]


def typical_step(worker: WorkerView) -> StepShape | None:
    """What this worker computes in one go, by which its cost is compared: what it learned is true there. None: nothing now."""
    if worker.role is WorkerRole.PREFILL:
        return StepShape(CHUNK_TOKENS, pairs(CHUNK_TOKENS, 0))
    if worker.running <= 0:
        return None
    return StepShape(0, 0, worker.running, max(worker.context_tokens, worker.running))
