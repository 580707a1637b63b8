"""Decisions on a fixed scenario, as text: whoever changes a policy sees what changes, request by request.

When a change is meant, `python tests/unit/router/test_golden_trace.py` writes the text anew; read the difference before
committing it.
"""

from __future__ import annotations

import random
from pathlib import Path
from types import MappingProxyType

from core.blocks import BlockKey, KvLayout
from core.cost_model import StepCost
from core.kv_changes import KvChanges
from core.report import WorkerState
from core.request import Slo, WorkerRole
from router.placing import Placer
from router.policies import make_policy
from router.policy import Need, Nobody, Pair
from router.view import NO_CLAIM, Claim, ClusterView, WorkerView

TRACE = Path(__file__).with_name("golden_trace.txt")
POLICIES = ("goodput", "least_load", "kv_cost", "conductor")
LAYOUT = KvLayout(b"\x07" * 16, "float32", 16, 4, 64, 16)
P, D, C = WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.COLOCATED
QUICK = StepCost(2e-3, 1e-4, 1e-9, 2e-4, 1e-7)
SLOW = StepCost(4e-3, 2e-4, 2e-9, 4e-4, 2e-7)
TIGHT, LOOSE, NONE = Slo(ttft_s=0.25, tbt_s=0.02), Slo(ttft_s=2.0, tbt_s=0.2), Slo()


def worker(name: str, role: WorkerRole, cost: StepCost = QUICK, **fields: object) -> WorkerView:
    made = WorkerView(name, role, 1, WorkerState.READY, "127.0.0.1:1", sequence=1, layout=LAYOUT, step_cost=cost)
    return replaced(made, blocks_total=4000, blocks_free=4000, **fields)


def replaced(view: WorkerView, **fields: object) -> WorkerView:
    return WorkerView(**{name: fields.get(name, getattr(view, name)) for name in WorkerView.__slots__})


def prompt(conversation: int, blocks: int) -> tuple[BlockKey, ...]:
    """The first blocks of a conversation."""
    return tuple((conversation << 32 | block).to_bytes(8, "big") * 2 for block in range(blocks))


class Scene:
    """A small cluster and one router's view of it, on a clock that the script turns."""

    def __init__(self, policy: str) -> None:
        self.lines = [f"== {policy}"]
        self.now = 100.0
        self._placer = Placer(make_policy(policy), 3.0, random.Random(0))
        self._workers: dict[str, WorkerView] = {}
        self._view = ClusterView()
        self.report(worker("p0", P), worker("p1", P), worker("p2", P, SLOW), worker("d0", D), worker("d1", D), worker("c0", C))

    def report(self, *workers: WorkerView) -> None:
        for one in workers:
            known = self._workers.get(one.worker_id)
            sequence = known.sequence + 1 if known is not None else 1
            self._workers[one.worker_id] = replaced(one, sequence=sequence)
            if known is not None:
                said = f"{one.state.value}, {one.waiting_tokens} tokens wait, {one.running} run"
                self.lines.append(f"{self.now:7.2f}  {one.worker_id} reports: {said}")
        view = ClusterView(1, MappingProxyType(dict(self._workers)))
        self._view = view.keeping(self._view, frozenset(self._workers), self.now)

    def computed(self, name: str, conversation: int, blocks: int) -> None:
        if self._placer.index is not None:
            self._placer.index.heard(name, KvChanges(0, 2, b"".join(prompt(conversation, blocks))))
        self.lines.append(f"{self.now:7.2f}  {name} has {blocks} blocks of conversation {conversation}")

    def ask(self, conversation: int, tokens: int, slo: Slo = NONE, answer: int = 100, avoid: tuple[str, ...] = ()) -> None:
        situation = self._placer.situation(self._view, frozenset(self._workers), self.now)
        keys = prompt(conversation, tokens // 16) if self._placer.index is not None else ()
        need = Need(tokens, frozenset(avoid), keys=keys, draw=conversation, slo=slo, output_tokens=answer, now=self.now)
        decision = self._placer._policy.decide(situation, need)
        self.lines.append(f"{self.now:7.2f}  conversation {conversation}, {tokens} tokens -> {self._place(decision.place)}")
        for candidate in decision.candidates[:3]:
            times = f"ttft {candidate.ttft_s * 1e3:.1f} ms, gap {candidate.gap_s * 1e3:.2f} ms"
            self.lines.append(f"             {self._place(candidate.pair)}: {times}, {candidate.reason}")
        if isinstance(decision.place, Pair):
            claim = Claim(decision.place.prefill, tokens if decision.place.prefill else 0, decision.place.decode, tokens)
            self._placer.moved(NO_CLAIM, claim, self.now)
            self._placer.accepted(claim, keys, self.now)

    def _place(self, place: Pair | Nobody) -> str:
        if isinstance(place, Nobody):
            return f"nobody: {place.reason}"
        return f"{place.prefill} + {place.decode}" if place.prefill else place.decode


def script(scene: Scene) -> None:
    """Idle; a burst before any report; cached prefixes; a busy cluster; a drain; a controller that falls silent."""
    scene.ask(1, 1024)
    for conversation in range(2, 6):
        scene.ask(conversation, 2048, TIGHT)
    scene.now += 1.0
    scene.computed("p0", 1, 64)
    scene.report(worker("p0", P, waiting_tokens=6000), worker("p1", P, waiting_tokens=2500), worker("d0", D, running=3))
    scene.ask(1, 1536, TIGHT)
    scene.ask(1, 1600, LOOSE)
    scene.ask(9, 32, NONE, answer=10)
    scene.now += 1.0
    scene.report(
        worker("p0", P),
        worker("p1", P),
        worker("d0", D, running=60, context_tokens=90_000),
        worker("d1", D, running=58, context_tokens=80_000),
        worker("c0", C, running=2, context_tokens=1000),
    )
    scene.ask(10, 1024, TIGHT)
    scene.ask(11, 1024, LOOSE, answer=1000)
    scene.report(worker("d0", D, state=WorkerState.DRAINING), worker("p0", P, state=WorkerState.DRAINING))
    scene.ask(12, 512, TIGHT)
    scene.ask(13, 512, TIGHT, avoid=("d1", "c0"))
    scene.now += 10.0
    scene.ask(14, 512, LOOSE)


def trace() -> str:
    lines = []
    for policy in POLICIES:
        scene = Scene(policy)
        script(scene)
        lines += [*scene.lines, ""]
    return "\n".join(lines)


def test_decisions_are_those_that_were_read_and_committed():
    assert trace() == TRACE.read_text(), "meant? then run: python tests/unit/router/test_golden_trace.py"


def test_the_same_scenario_gives_the_same_decisions():
    assert trace() == trace()


if __name__ == "__main__":
    TRACE.write_text(trace())
