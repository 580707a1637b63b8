"""Small clusters for the simulator's tests."""

from __future__ import annotations

from typing import Any

from core.config import Config
from core.cost_model import CostModel, StepCost
from core.request import AttemptKey, WorkerRole, WorkItem
from router import events as ev
from sim.events import Events
from sim.network import Network
from sim.post import Post
from sim.prompt import STOP_ID, Content, Prompt
from sim.replica import Replica, layout_of
from sim.site import Site
from sim.worker import SimWorker
from sim.workload import Arrival
from tandem.sampling import SamplingParams

COST = StepCost(base_s=0.010, prefill_token_s=0.001, prefill_pair_s=1e-6, decode_row_s=0.002, decode_context_s=1e-5)


class Ear:
    """A router that only listens."""

    name = "ear"

    def __init__(self) -> None:
        self.said: list[tuple[float, str, ev.WorkerEvent]] = []
        self.events: Events | None = None

    def heard(self, worker: str, epoch: int, events: list[tuple[str, ev.WorkerEvent]]) -> None:
        assert self.events is not None
        self.said += [(self.events.now(), request_id, event) for request_id, event in events]


def worker_of(engine: str, role: WorkerRole, num_blocks: int, **config: Any) -> tuple[SimWorker, Ear]:
    """Alone on its site, told by an ear instead of a router."""
    tree: dict[str, Any] = {
        "engine": {"block_size": 4, "max_running": 6, "max_step_tokens": 16} | config,
        "sim": {"engine": engine},
    }
    whole = Config.model_validate(tree)
    events, ear = Events(), Ear()
    ear.events = events
    site = Site(whole, events, Post(events, 0.0), Network(events, 1e9, 0.0))
    layout = layout_of(CostModel(COST, 64), whole.engine.block_size)
    worker = SimWorker("worker-0", role, 1, site, Replica(COST.step_s, COST, layout, num_blocks, 1, 0.0), whole.engine)
    site.workers[worker.name] = worker
    return worker, ear


def item_of(worker: SimWorker, arrival: Arrival, number: int, attempt: int = 1, most: int | None = None) -> WorkItem:
    content = Content(arrival, number, worker.config.block_size)
    worker.site.contents[content.number] = content
    exact = worker.site.config.sim.engine == "exact"
    prompt: Any = content.prompt_ids() if exact else Prompt(content, content.input_tokens)
    sampling = SamplingParams(max_tokens=most or content.output_tokens, seed=content.number)
    return WorkItem(AttemptKey(f"r{number}", attempt), prompt, arrival.input_tokens, sampling, eos_token_ids=(STOP_ID,))
