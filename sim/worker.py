"""A worker of the pools: what `worker`, `prefill_worker` and `decode_worker` do around the engine, on virtual time.

Scheduling, roles, inventory, fences (`worker.attempts`), the export's states (`kvtransfer.handoff`) are the shipped objects;
the driver is this file, `sim.ingest` and `sim.exports`, where threads, sockets and tasks are in the product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from cluster.roles import engine_role
from core.blocks import BlockKey, BlockRecord, KvSource, KvTicket, root_key
from core.config import EngineConfig
from core.cost_model import Fit
from core.errors import TandemError
from core.report import ModelFacts, WorkerReport, WorkerState
from core.request import AttemptKey, WorkerRole, WorkItem
from engine.output import Committed, EngineLoad, Prefilled, StepOutput
from engine.role import Terms
from kvtransfer.directory import NodeRecord
from router import events as ev
from sim.counted import CountedLoop
from sim.events import Event
from sim.executor import CostExecutor, ExactLoop
from sim.exports import SimExports
from sim.feeds import SimFeeds
from sim.fetches import SimFetches
from sim.ingest import SimIngests
from sim.plane import WorkerShare
from sim.plane_fetches import PlaneFetches
from sim.replica import Replica
from sim.site import Site
from sim.stores import plane_layout
from sim.talk import Talk
from worker.attempts import Peer, Refused

if TYPE_CHECKING:
    from sim.router import SimRouter

HORIZON_S = 1.0
"""Of steps that are taken in one go: their tokens reach the router together, each with its own time."""
TICK_S = 1.0
"""How often leases are looked at while there are any."""
STAYS = Terms(hand_over=False)
CONTEXT_MAX = 1 << 24
MODEL = ModelFacts("sim", CONTEXT_MAX, 1 << 20, "sim")


class SimWorker:
    def __init__(self, name: str, role: WorkerRole, epoch: int, site: Site, replica: Replica, engine: EngineConfig) -> None:
        self.name, self.role, self.epoch = name, role, epoch
        self.site, self.replica, self.config = site, replica, engine
        self.alive = True
        self.state = WorkerState.READY
        self._address, self._fit = f"{name}@{epoch}", Fit(replica.cost, 1, 0.0, 0.0)
        self.inventory = site.books.inventory(name, replica.num_blocks, engine.eviction, engine.tenant_share)
        self.table = site.books.table(name)
        self.talk = Talk(self, HORIZON_S if site.config.sim.engine == "counted" else 0.0)
        self.source = KvSource(name, epoch, name, name)
        self._root = root_key(replica.layout.fingerprint)
        self.engine = self._make_engine()
        self.exports = SimExports(self)
        self.ingests = SimIngests(self)
        self._inbox: list[Callable[[float], object]] = []
        self._step: Event | None = None
        self._ticking = self._turning = False
        self._began = 0.0
        self.changed = True
        """Something may have changed that a report would say."""
        self.feeds = SimFeeds(self)
        self.plane = WorkerShare(self, site.plane) if site.plane is not None else None
        self._entering: set[AttemptKey] = set()  # to be computed and decoded here, once what others have of them has come

    def _make_engine(self) -> CountedLoop | ExactLoop:
        site, replica, config = self.site, self.replica, self.config
        role = engine_role(site.config, self.role)
        executor = CostExecutor(replica.layout, replica.num_blocks, replica.step_s, site.contents)
        if site.config.sim.engine == "exact":
            return ExactLoop(config, role, self.inventory, executor, self.root)
        return CountedLoop(config, role, self.inventory, executor, replica.step_s, HORIZON_S)

    def root(self, salt: bytes) -> BlockKey:
        return root_key(self.replica.layout.fingerprint, salt) if salt else self._root

    # ---- what routers say ------------------------------------------------------------------------------------------

    def command(self, router: SimRouter, command: ev.Send) -> None:
        if not self.alive:
            return
        self.changed = True
        peer = self.talk.peer(router)
        match command:
            case ev.SendCancel(_, key):
                self.cut()
                self.talk.let_go(key)
                running = self.table.cancel(key, self.site.events.now())
                if running is not None:
                    self.stop(running)
            case ev.SendOpenHandoff(_, key, ticket):
                if self.table.owner(key) != peer or not self.ingests.pull(key, ticket):
                    self.talk.refuse(router, key, "nothing is reserved for this attempt")
            case ev.SendReserve(_, item) | ev.SendStartPrefill(_, item) | ev.SendGenerateLocal(_, item):
                self._open(router, peer, command, item)

    def _open(self, router: SimRouter, peer: Peer, command: ev.Send, item: WorkItem) -> None:
        now = self.site.events.now()
        draining = self.state is not WorkerState.READY
        answer = Refused("this worker is draining") if draining else self.table.admit(item.key, peer, now)
        if isinstance(answer, Refused):
            if isinstance(command, ev.SendReserve):
                event = ev.Reserved(self.name, item.key.attempt, False, answer.reason)
                self.talk.say(router, item.key, event)
            else:
                self.talk.refuse(router, item.key, answer.reason)
            return
        if answer.superseded is not None:
            self.stop(answer.superseded)
        if isinstance(command, ev.SendReserve):
            self.ingests.reserve(item)
        elif isinstance(command, ev.SendStartPrefill):
            self.exports.open(item)
        else:
            self._entering.add(item.key)
            self.fetches.admit(item, lambda: self.call(lambda at: self._enter(item, at)))
        self._tick_later()

    def _enter(self, item: WorkItem, now: float) -> None:
        if item.key in self._entering:  # else it was cancelled meanwhile
            self._entering.remove(item.key)
            self.submit(item, now, STAYS)

    @property
    def fetches(self) -> SimFetches | PlaneFetches:
        """How it comes by what others have of a prompt."""
        return self.exports.fetches if self.plane is None else self.plane.fetches

    @property
    def entering(self) -> int:
        """Prompts that wait for blocks from elsewhere before they are computed and decoded here."""
        return len(self._entering)

    def on_blocks(self) -> None:
        """Blocks may have come or gone."""
        self.feeds.poke()
        if self.plane is not None:
            self.plane.announcer.poke()

    def node_record(self) -> NodeRecord:
        """What the directory knows of it."""
        return NodeRecord(self.source, plane_layout(self.replica.layout), self.role)

    # ---- the engine ------------------------------------------------------------------------------------------------

    def call(self, run: Callable[[float], object]) -> None:
        """Between two steps; now when none is under way."""
        self._inbox.append(run)
        if self._step is None:
            self._turn()
        else:
            self.cut()

    @property
    def load(self) -> EngineLoad:
        return self.engine.load()

    def submit(self, item: WorkItem, now: float, terms: Terms, blocks: list[int] | None = None, computed: int = 0) -> bool:
        """False when the engine did not take it; whoever asked has been told and the blocks are released."""
        try:
            self.engine.submit(item, now, blocks, computed, None, terms)
        except TandemError as error:
            if blocks is not None:
                self.inventory.release(blocks)
            self.talk.fail(item.key, error)
            return False
        return True

    def stop(self, key: AttemptKey) -> None:
        """Frees what an attempt holds. Idempotent."""
        self.talk.let_go(key)
        self._entering.discard(key)
        self.ingests.drop(key)
        self.exports.revoke(key, "the attempt was cancelled")
        self.call(lambda _: self.engine.cancel(key))

    def poke(self) -> None:
        """Memory came free: who waits for it is looked at."""
        if self._step is None:
            self._turn()
        elif self.engine.waits():
            self.cut()

    def cut(self) -> None:
        """Before anything is changed or taken from outside the engine: only the step of this moment goes on."""
        step = self._step
        if step is not None:
            end, output = self.engine.cut(self.site.events.now())
            if output.tokens:
                self.talk.tokens(output.tokens)
            if end < step.when:
                step.cancel()
                self._step = self.site.events.at(end, self._stepped)

    def _turn(self) -> None:
        """Commands, then a step, until one takes time or there is nothing to do. What they cause meanwhile waits its turn."""
        if not self._turning:
            self._turning = True
            self._turns()
            self._turning = False
            self.changed = True

    def _turns(self) -> None:
        events, engine = self.site.events, self.engine
        while self._step is None and self.alive:
            now = events.now()
            while self._inbox:
                inbox, self._inbox = self._inbox, []
                for run in inbox:
                    run(now)
            if not engine.has_work():
                break
            self._began = now
            end = engine.begin(now)
            if end > now:
                self._step = events.at(end, self._stepped)
            else:
                self._on_output(engine.finish(), now)

    def _stepped(self) -> None:
        self._step, self._turning = None, True
        output = self.engine.finish()
        self._on_output(output, self.site.events.now())
        self._turning = False
        self._turn()

    def _on_output(self, output: StepOutput, now: float) -> None:
        talk = self.talk
        for key in output.joined:
            self.ingests.joined(key, self._began)
        if output.prefilled:
            over = {token.key for token in output.tokens if token.finish_reason is not None}
            self._say_prefilled([prefilled for prefilled in output.prefilled if prefilled.key in over])
        if output.tokens:
            talk.tokens(output.tokens)
        for committed in output.committed:
            self.exports.announce(committed.key, _upto(committed))
        if output.prefilled:
            for prefilled in output.prefilled:
                self.exports.close(prefilled)
            self._say_prefilled([prefilled for prefilled in output.prefilled if prefilled.key not in over])
        for key in talk.lose(output):
            self.exports.revoke(key, "the prompt could not be computed")
        for key in output.left:
            talk.let_go(key)
            if key not in self.exports:
                self.ingests.forget(key)
                self.table.end(key, now)
        if output.committed or output.left:
            self.on_blocks()

    def _say_prefilled(self, done: list[Prefilled]) -> None:
        """Of an answer that ends with its first token before that token, as in `worker.links`: nobody listens after it."""
        for one in done:
            self.talk.event(one.key, ev.PrefillDone(self.name, one.key.attempt, one.timing, one.cached_tokens))

    # ---- time ------------------------------------------------------------------------------------------------------

    def _tick_later(self) -> None:
        if not self._ticking:
            self._ticking = True
            self.site.events.later(TICK_S, self._tick)

    def _tick(self) -> None:
        self._ticking = False
        if not self.alive:
            return
        now = self.site.events.now()
        for key in sorted(self.table.expire(now)):
            self.stop(key)
        self.exports.expire(now)
        self.ingests.expire(now)
        if len(self.table):
            self._tick_later()

    def die(self) -> None:
        """At once, with everything it holds. Tokens of steps that were complete were sent before."""
        self.cut()
        if self._step is not None:
            self._step.cancel()
            self._step = None
        self.talk.let_all_go()
        self.alive = False
        self.state = WorkerState.DEAD
        self.ingests.close()
        if self.plane is not None:
            self.plane.fetches.close()

    # ---- what it says of itself ------------------------------------------------------------------------------------

    def report(self, sequence: int) -> WorkerReport:
        load = self.load
        return WorkerReport(
            self.name,
            self.role,
            self.epoch,
            sequence,
            state=self.state,
            grpc_address=self._address,
            blocks=self.inventory.counts(),
            leases_open=self.inventory.leases_open(),
            running=load.running,
            waiting=load.waiting + len(self.ingests) + len(self._entering),
            waiting_tokens=load.waiting_tokens,
            context_tokens=load.context_tokens,
            step_cost=self._fit,
            layout=self.replica.layout,
            model=MODEL,
        )

    def ticket(self, key: AttemptKey) -> KvTicket:
        return KvTicket(key, self.replica.layout, self.source, self.site.config.transfer.lease_s)

    # ---- for audits ------------------------------------------------------------------------------------------------

    @property
    def settled(self) -> bool:
        """No step is under way, and nothing waits for one."""
        return self._step is None and not self._inbox

    def holders(self) -> set[AttemptKey]:
        """Attempts that something is kept of."""
        return {*self.engine.holding(), *self.exports.keys(), *self.ingests.keys(), *self._entering}

    def held_blocks(self) -> list[list[int]]:
        """References outside leases, a list per holder."""
        fetches = self.exports.fetches if self.plane is None else self.plane
        return [*self.engine.holding().values(), *self.ingests.held_blocks(), *fetches.held_blocks()]

    def check(self) -> None:
        """Asserts that its tables agree."""
        self.table.check()
        self.inventory.check()


def _upto(committed: Committed) -> int:
    """Blocks that are announced by now, from the first on."""
    last: object = committed.records[-1]
    return 1 + (last.index if isinstance(last, BlockRecord) else cast(int, last))
