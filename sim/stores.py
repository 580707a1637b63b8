"""Store nodes on virtual time, after `kvtransfer.store_node` and `store_offers`: memory that takes what workers offer and lends
it to whoever wants to read it. The inventory is the shipped one. No disk, and no copies of hot blocks.

A store's port is one of the network, as a worker's is: what it takes and gives shares that with everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from core.blocks import BlockKey, KvLayout, KvSource
from core.config import Config
from core.errors import OutOfBlocksError
from core.inventory import Inventory
from core.request import WorkerRole
from kvtransfer.directory import NodeRecord
from sim.events import Event, Events
from sim.network import Flow, Network
from sim.post import Post

OFFERS_RUNNING, OFFERS_WAITING_MAX = 4, 64
BATCH_BYTES = 16 * 2**20
"""These as in `kvtransfer.store_offers`."""
BATCH_BLOCKS_MIN = 32
"""Of an offer: the product's are smaller where blocks are large, and so many that each would be an event of its own."""


def plane_layout(layout: KvLayout) -> KvLayout:
    """Profiles of one model on two kinds of GPU have fingerprints of their own; its KV is the same on both."""
    return replace(layout, fingerprint=bytes(len(layout.fingerprint)))


class Lender(Protocol):
    """A node that others read blocks of."""

    name: str
    epoch: int
    alive: bool
    inventory: Inventory

    def cut(self) -> None:
        """Before its books are changed."""

    def poke(self) -> None:
        """Memory came free."""


class Loans:
    """What one node lends: references that end when the reader says so, or when their time is over."""

    def __init__(self, node: Lender, events: Events) -> None:
        self._node = node
        self._events = events
        self._open: dict[object, tuple[list[int], Event]] = {}

    def lend(self, reader: object, keys: Sequence[BlockKey], for_s: float) -> list[int]:
        """The places of `keys` that are resident, each held from now on."""
        self._node.cut()
        found = self._node.inventory.find(keys)
        blocks = [block for block in found if block is not None]
        if blocks:
            self._open[reader] = blocks, self._events.later(for_s, lambda: self.end(reader))
        return [place for place, block in enumerate(found) if block is not None]

    def end(self, reader: object) -> None:
        """Idempotent."""
        if reader in self._open and self._node.alive:
            blocks, timer = self._open.pop(reader)
            timer.cancel()
            self._node.cut()
            self._node.inventory.release(blocks)
            self._node.poke()

    def held_blocks(self) -> list[list[int]]:
        return [blocks for blocks, _ in self._open.values()]


@dataclass(slots=True)
class Offer:
    """`answer` hears how many blocks were taken; None: no offer of this store's any more, or too many."""

    source: Lender
    keys: list[BlockKey]
    answer: Callable[[int | None], None]


class _Taking:
    """An offer that is carried out."""

    __slots__ = ("blocks", "flow", "keys", "offer", "taken", "timer")

    def __init__(self, offer: Offer, keys: list[BlockKey]) -> None:
        self.offer = offer
        self.keys = keys  # not here yet, in order
        self.blocks: list[int] = []  # of the batch under way
        self.flow: Flow | None = None
        self.timer: Event | None = None
        self.taken = 0


class SimStore:
    def __init__(
        self, name: str, epoch: int, config: Config, layout: KvLayout, events: Events, post: Post, net: Network
    ) -> None:
        store = config.store
        self.name, self.epoch, self.alive, self.accepting = name, epoch, True, True
        self.layout = plane_layout(layout)
        self.taken_blocks = self.refused_blocks = 0
        blocks = max(2, store.dram_bytes // layout.block_bytes)
        self.inventory = Inventory(blocks, policy=store.policy, tenant_share=store.tenant_share, clock=None)
        self.loans = Loans(self, events)
        self.on_blocks: Callable[[], None] = lambda: None
        self._pull_timeout_s = config.transfer.pull_timeout_s
        self._events, self._post, self._network = events, post, net
        self._batch = max(1, min(max(BATCH_BLOCKS_MIN, BATCH_BYTES // layout.block_bytes), blocks // 2))
        self._waiting: list[Offer] = []
        self._takings: dict[_Taking, None] = {}
        self._coming: set[BlockKey] = set()

    def node_record(self) -> NodeRecord:
        return NodeRecord(
            KvSource(self.name, self.epoch, f"{self.name}@{self.epoch}", self.name), self.layout, WorkerRole.STORE
        )

    def cut(self) -> None:
        """Nothing computes here."""

    def poke(self) -> None:
        """Nobody waits for its memory: what has no room is refused."""

    def offered(self, offer: Offer) -> None:
        if not self.alive:
            return
        if not self.accepting or len(self._takings) + len(self._waiting) >= OFFERS_RUNNING + OFFERS_WAITING_MAX:
            self._post.send(self.name, offer.source.name, offer.answer, None)
        elif len(self._takings) < OFFERS_RUNNING:
            self._begin(offer)
        else:
            self._waiting.append(offer)

    def die(self) -> None:
        """With everything it holds; nobody is answered any more."""
        self.alive = False
        for taking in self._takings:
            if taking.flow is not None:
                self._network.cancel(taking.flow)

    def held_blocks(self) -> list[list[int]]:
        """References, a list per holder."""
        return [taking.blocks for taking in self._takings] + self.loans.held_blocks()

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _begin(self, offer: Offer) -> None:
        found = self.inventory.find(offer.keys)  # to be offered counts as a use
        self.inventory.release([block for block in found if block is not None])
        wanted = [key for key, block in zip(offer.keys, found, strict=True) if block is None and key not in self._coming]
        taking = _Taking(offer, wanted)
        self._takings[taking] = None
        self._coming.update(wanted)
        taking.timer = self._events.later(self._pull_timeout_s, lambda: self._end(taking))
        self._pull(taking)

    def _pull(self, taking: _Taking) -> None:
        """The next batch; an end when there is none, or no room for it."""
        keys = taking.keys[taking.taken : taking.taken + self._batch]
        try:
            taking.blocks = self.inventory.allocate(len(keys))
        except OutOfBlocksError:
            keys = []
        if not keys:
            self._end(taking)
            return
        num_bytes = len(keys) * self.layout.block_bytes
        taking.flow = self._network.move(taking.offer.source.name, self.name, num_bytes, lambda: self._arrived(taking, keys))

    def _arrived(self, taking: _Taking, keys: list[BlockKey]) -> None:
        source, inventory = taking.offer.source, self.inventory
        taking.flow = None
        if not source.alive or not self._post.together(source.name, self.name):
            self._end(taking)
            return
        blocks = [inventory.commit(*pair) for pair in zip(taking.blocks, keys, strict=True)]
        taking.blocks = []
        inventory.release(blocks)
        taking.taken += len(blocks)
        self.on_blocks()
        self._pull(taking)

    def _end(self, taking: _Taking) -> None:
        """All of it is here, or nothing more of it comes."""
        if taking not in self._takings or not self.alive:
            return
        del self._takings[taking]
        if taking.flow is not None:
            self._network.cancel(taking.flow)
        if taking.timer is not None:
            taking.timer.cancel()
        self.inventory.release(taking.blocks)
        self._coming.difference_update(taking.keys)
        self.taken_blocks += taking.taken
        self.refused_blocks += len(taking.keys) - taking.taken
        self._post.send(self.name, taking.offer.source.name, taking.offer.answer, taking.taken)
        if self._waiting:
            self._begin(self._waiting.pop(0))
