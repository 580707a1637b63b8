"""What workers share of the KV plane: their blocks can be read, are announced and offered, and others' are fetched."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterable, Sequence

from prometheus_client.core import Metric

from core.blocks import BlockKey, KvSource
from core.config import Config
from core.samples import gauge
from core.service import Registration
from engine.output import StepOutput
from kvtransfer.announcer import Announcer
from kvtransfer.channels import Channels
from kvtransfer.collective_end import open_collective
from kvtransfer.directory import Directory, NodeRecord, open_directory
from kvtransfer.exports import Exports
from kvtransfer.flight import Ground
from kvtransfer.hold_client import HoldClient
from kvtransfer.kv_node import KvNode
from kvtransfer.kv_service import KvNodeServicer
from kvtransfer.loopback import PROCESS_HUB
from kvtransfer.offerer import Offerer
from kvtransfer.plane import build_fetcher, offered, open_tcp
from kvtransfer.residency import Here
from kvtransfer.resident import Resident
from tandem.v1 import kv_pb2_grpc
from worker.arrivals import Arrivals
from worker.kv_metrics import collect
from worker.shell import Base

log = logging.getLogger(__name__)

ASSUMED_TOKENS_PER_S = 1000.0  # of prefill, until a prompt has been computed here
WEIGHT = 0.2  # of the newest prompt


class KvPlane:
    """One per worker; everything on the asyncio thread. `started` once its server listens, `close` after the engine ended.

    While it lives, its arena can be reached from inside the process too. A worker that is the only node there can be, or
    that neither fetches nor offers, has no directory: nothing runs and nothing is sent.
    """

    def __init__(self, base: Base) -> None:
        spec, node, clock = base.spec, base.node, base.clock
        config = spec.config
        self.exports = Exports(spec.epoch, node.arena, node.inventory, clock, digest=config.transfer.digest, layout=node.layout)
        self.channels = Channels()
        self._collective = open_collective(config.transfer, node.arena, spec.listen)
        self.fetcher = build_fetcher(
            config.transfer,
            node.arena.bytes_view(),
            node.layout,
            self.channels,
            clock,
            base.host_id,
            collective=self._collective,
        )
        self.resident: Resident | None = None
        self.announcer: Announcer | None = None
        self.offerer: Offerer | None = None
        self._base = base
        self._tcp = open_tcp(config.transfer, self.exports, spec.listen)
        self._node = KvNode(self.exports, node.inventory, node.layout, self.source, spec.role, config.engine.eviction)
        self._peers = 0
        self._block_s: float | None = None
        node.inventory.typical_cost_s = node.layout.block_size / ASSUMED_TOKENS_PER_S
        self._tasks: list[asyncio.Task[None]] = []
        self._directory: Directory | None = None
        if wanted(config):
            self._directory = open_directory(config.store, config.redis, spec.controller)
            self._assemble(self._directory)
        self.arrivals = Arrivals(
            self.resident,
            node.inventory,
            node.root_key,
            config.engine.block_size,
            config.store.fetch_timeout_s,
            clock,
        )
        PROCESS_HUB.register(spec.worker_id, spec.epoch, node.arena)

    def registrations(self) -> list[Registration]:
        servicer = KvNodeServicer(self.exports, self._node)
        served = [Registration("tandem.v1.Kv", kv_pb2_grpc.add_KvServicer_to_server, servicer)]
        return served if self._collective is None else [*served, self._collective.registration(self.exports)]

    def started(self) -> None:
        if self.announcer is not None:
            self._run(self.announcer.run(), "kv-announce")
        if self.offerer is not None:
            self._run(self.offerer.run(), "kv-offer")

    def source(self) -> KvSource:
        """Where this worker's blocks can be read, once its server listens."""
        spec, arena = self._base.spec, self._base.node.arena
        tcp_address = self._tcp.address if self._tcp is not None else ""
        return KvSource(
            worker_id=spec.worker_id,
            epoch=spec.epoch,
            grpc_address=self._base.grpc_address(),
            host_id=self._base.host_id,
            arena_path=arena.path,
            num_blocks=arena.num_blocks,
            transports=offered(arena, tcp_address, collective=self._collective is not None),
            tcp_address=tcp_address,
        )

    def on_step(self, output: StepOutput) -> None:
        """After every step that has something to say."""
        size = self._base.node.layout.block_size
        for prefilled in output.prefilled:
            computed = prefilled.closing.num_tokens - prefilled.cached_tokens
            if computed >= 2 * size and prefilled.timing.prefill_s > 0:
                self._learn(prefilled.timing.prefill_s * size / computed)
        if self.announcer is not None:
            self.announcer.poke()

    def leave_to_others(self, keys: Sequence[BlockKey]) -> None:
        """Blocks that come from a worker which offers them to the store itself."""
        if self.offerer is not None:
            self.offerer.skip(keys)

    def tick(self) -> None:
        self.exports.expire(self._base.clock.now())
        self._node.sweep()

    def collect(self) -> Iterable[Metric]:
        yield gauge("tandem_kv_peers", "Nodes with blocks of this model that can be asked for them.", self._peers)
        yield from collect(self.fetcher.stats, self.resident, self.announcer, self.offerer)

    async def close(self) -> None:
        PROCESS_HUB.unregister(self._base.spec.worker_id, self._base.spec.epoch)
        await self.arrivals.close()
        if self.resident is not None:
            await self.resident.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self.announcer is not None and self._tasks:
            await self.announcer.leave()
        if self._directory is not None:
            await self._directory.close()
        if self._tcp is not None:
            await asyncio.to_thread(self._tcp.close)
        await self.exports.close()
        await self.fetcher.close()
        if self._collective is not None:
            await self._collective.close()
        await self.channels.close()

    def _assemble(self, directory: Directory) -> None:
        spec, node, clock = self._base.spec, self._base.node, self._base.clock
        store = spec.config.store
        if store.offer:
            self.offerer = Offerer(
                self.exports, node.inventory, self.channels, node.layout, self.source, lambda: self._block_s or 0.0
            )
        if store.fetch and spec.config.engine.prefix_cache:
            ground = Ground(
                Here(spec.worker_id, self._base.host_id, node.layout),
                node.inventory,
                directory,
                self.fetcher,
                HoldClient(self.channels, node.layout, spec.worker_id, spec.epoch),
                clock,
                self._compute_block_s,
                self.leave_to_others,
            )
            self.resident = Resident(ground, lambda: self._peers > 0)
        self.announcer = Announcer(
            directory, node.inventory, self._record, store.directory_ttl_s, clock, added=self._added, met=self._met
        )

    def _record(self) -> NodeRecord:
        return NodeRecord(self.source(), self._base.node.layout, self._base.spec.role)

    def _added(self, keys: Sequence[BlockKey]) -> None:
        if self.offerer is not None:
            self.offerer.offer(keys)

    def _met(self, nodes: Sequence[NodeRecord]) -> None:
        """Nobody is asked for blocks while nobody of this model is there, so that prompts lose no time over it."""
        here, layout = self._base.spec.worker_id, self._base.node.layout
        self._peers = sum(node.source.worker_id != here and node.layout == layout for node in nodes)
        self.fetcher.keep([node.source for node in nodes], self._base.spec.config.store.directory_ttl_s)
        if self.offerer is not None and self.announcer is not None and self.offerer.met(nodes):
            self.announcer.again()  # a store that knows nothing of ours yet

    def _compute_block_s(self) -> float:
        if self._base.spec.config.store.fetch_always:
            return float("inf")
        return self._block_s or self._base.node.layout.block_size / ASSUMED_TOKENS_PER_S

    def _learn(self, block_s: float) -> None:
        self._block_s = block_s if self._block_s is None else self._block_s + WEIGHT * (block_s - self._block_s)
        self._base.node.inventory.typical_cost_s = self._block_s

    def _run(self, work: Coroutine[object, object, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(_ended)
        self._tasks.append(task)


def wanted(config: Config) -> bool:
    """Whether a worker has any use for a directory: it fetches or offers, and somebody else can be there."""
    cluster, store = config.cluster, config.store
    company = store.nodes > 0 or cluster.prefill + cluster.decode + cluster.colocated > 1
    return company and (store.fetch or store.offer)


def _ended(task: asyncio.Task[None]) -> None:
    """Serving goes on without what failed; its KV is found by nobody then."""
    if not task.cancelled() and (mistake := task.exception()) is not None:
        log.error("%s failed; this worker goes on without it", task.get_name(), exc_info=mistake)
