"""What a router's commands do at a decode worker, and what its steps tell the router. Colocated workers use it as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from core.blocks import BlockKey
from core.clock import Clock
from core.errors import InvalidRequestError, OutOfBlocksError, TandemError
from core.inventory import Inventory
from core.request import AttemptKey, AttemptTiming, WorkItem
from core.telemetry import TRANSFER_BYTES, TRANSFER_SECONDS, Histogram
from decode_worker.ingest import Ingests
from engine.loop import StepLoop
from engine.output import StepOutput
from engine.role import Terms
from kvtransfer.puller import IngestResult
from worker.bridge import EngineThread
from worker.kv_plane import KvPlane
from worker.links import RouterLinks
from worker.messages import GenerateLocal, Joined, OpenHandoff, Opening, Reserve, Reserved

STAYS = Terms(hand_over=False)


@dataclass(frozen=True, slots=True)
class _Landed:
    result: IngestResult
    at: float


class TransferStats:
    """Hand-offs that arrived here, for the metrics."""

    def __init__(self) -> None:
        self.seconds = Histogram(TRANSFER_SECONDS)
        self.exposed_s = Histogram(TRANSFER_SECONDS)
        self.bytes = Histogram(TRANSFER_BYTES)

    def observe(self, result: IngestResult) -> None:
        self.seconds.observe(result.transfer_s)
        self.exposed_s.observe(result.transfer_exposed_s)
        self.bytes.observe(result.bytes)


class DecodeHandler:
    """Reserves, takes hand-offs in, computes whole requests. Used from the asyncio thread only."""

    def __init__(
        self,
        engine: EngineThread,
        links: RouterLinks,
        ingests: Ingests,
        kv: KvPlane,
        inventory: Inventory,
        root_key: Callable[[bytes, str], BlockKey],
        clock: Clock,
        max_running: int,
    ) -> None:
        self.transfers = TransferStats()
        self._engine = engine
        self._links = links
        self._ingests = ingests
        self._kv = kv
        self._inventory = inventory
        self._root_key = root_key
        self._clock = clock
        self._max_running = max_running
        self._landed: dict[AttemptKey, _Landed] = {}  # handed to the engine, not in the batch yet

    # ---- commands

    def open(self, command: Opening) -> None:
        match command:
            case Reserve(item):
                self._reserve(item)
            case GenerateLocal(item):
                self._kv.arrivals.admit(item, self._enter, self._failed)
            case _:
                raise InvalidRequestError("a decode worker hands no prompts over; send StartPrefill to a prefill worker")

    def open_handoff(self, command: OpenHandoff) -> None:
        self._kv.leave_to_others(self._ingests.pull(command.key, command.ticket))

    def cancel(self, key: AttemptKey) -> None:
        self._ingests.drop(key)
        self._kv.arrivals.cancel(key)
        self._landed.pop(key, None)
        self._engine.cancel(key)

    def _reserve(self, item: WorkItem) -> None:
        """Answered at once, yes or no: a reservation never waits for memory or for a place in the batch."""
        load = self._engine.load
        if load.running + load.waiting + len(self._ingests) + len(self._kv.arrivals) >= self._max_running:
            self._refuse(item.key, f"{self._max_running} requests run here already")
            return
        try:
            cached = self._ingests.reserve(item)
        except OutOfBlocksError as error:
            self._refuse(item.key, error.message)
            return
        self._links.send(Reserved(item.key, granted=True, cached_tokens=cached))

    def _refuse(self, key: AttemptKey, reason: str) -> None:
        self._links.send(Reserved(key, granted=False, reason=reason))
        self._links.finish(key, "refused")

    # ---- hand-offs

    def landed(self, item: WorkItem, blocks: list[int], result: IngestResult, at: float) -> None:
        """The KV of the prompt is here: on with the tokens that prefill sampled, unless those were the last."""
        self.transfers.observe(result)
        closing = result.closing
        if closing.finished:
            self._inventory.release(blocks)
            self._links.finish(item.key)
            return
        self._landed[item.key] = _Landed(result, at)
        grown = replace(item, token_ids=item.token_ids + closing.generated)
        root = self._root_key(item.cache_salt, result.codec) if result.codec else None
        try:
            self._engine.call(
                partial(_submit_landed, grown, blocks, closing.num_tokens, root), partial(self._submitted, item.key, blocks)
            )
        except TandemError as error:
            self._submitted(item.key, blocks, error)

    def lost(self, key: AttemptKey, error: TandemError) -> None:
        self._links.fail(key, error)

    def _enter(self, item: WorkItem) -> None:
        self._engine.call(partial(_submit, item), partial(self._submitted, item.key, None))

    def _failed(self, key: AttemptKey, error: TandemError) -> None:
        self._submitted(key, None, error)

    def _submitted(self, key: AttemptKey, blocks: list[int] | None, error: TandemError | None) -> None:
        """The engine took the item, and the blocks with it, or took nothing."""
        if error is None:
            return
        if blocks is not None:
            self._inventory.release(blocks)
        self._landed.pop(key, None)
        self._links.fail(key, error)

    # ---- steps

    def on_step(self, output: StepOutput, started: float) -> None:
        for key in output.joined:
            self._joined(key, started)
        self._links.send_step(output)
        self._links.lose(output)
        for key in output.left:
            self._landed.pop(key, None)
            self._links.finish(key)

    def _joined(self, key: AttemptKey, started: float) -> None:
        landed = self._landed.pop(key, None)
        if landed is None:
            return  # cancelled meanwhile
        result = landed.result
        timing = AttemptTiming(
            handoff_wait_s=max(0.0, started - landed.at),
            transfer_s=result.transfer_s,
            transfer_exposed_s=result.transfer_exposed_s,
            transfer_bytes=result.bytes,
            transport=result.transport,
        )
        self._links.send(Joined(key, timing))


def _submit(item: WorkItem, loop: StepLoop, now: float) -> None:
    loop.submit(item, now, terms=STAYS)


def _submit_landed(
    item: WorkItem, blocks: list[int], computed_len: int, root: BlockKey | None, loop: StepLoop, now: float
) -> None:
    loop.submit(item, now, blocks, computed_len, root, STAYS)
