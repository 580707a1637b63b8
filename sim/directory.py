"""The directory of the KV plane on virtual time: the shipped table (`kvtransfer.local_directory`) behind messages, and nodes
that keep it told, after `kvtransfer.announcer`. Its word lags by what gathering news and a message take; it can be lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

from core.blocks import BlockKey
from core.errors import StaleEpochError
from core.inventory import Changes, Inventory
from kvtransfer.directory import Delta, NodeRecord, pack
from kvtransfer.gathering import due_at
from kvtransfer.local_directory import LocalDirectory
from sim.events import Event, Events
from sim.post import Post

DIRECTORY = "directory"
KEYS_MAX = 4096
PAUSE_MIN_S, PAUSE_MAX_S = 0.2, 5.0
JOINS_WHILE_YOUNG = 8
"""These as in `kvtransfer.announcer`."""

T = TypeVar("T")


class SimDirectory:
    def __init__(self, events: Events, post: Post, timeout_s: float) -> None:
        self.table = LocalDirectory()
        self.unanswered = 0
        self._events = events
        self._post = post
        self._timeout_s = timeout_s
        self._away = 0

    def ask(self, node: str, question: Callable[[LocalDirectory, float], T], answered: Callable[[T | None], None]) -> None:
        """`answered` hears what the table says, or None: no answer came within `store.directory_timeout_s`."""
        asked = _Asked(self, answered)
        asked.timer = self._events.later(self._timeout_s, partial(asked.hear, None))
        self._post.send(node, DIRECTORY, self._serve, node, question, asked)

    def tell(self, node: str, question: Callable[[LocalDirectory, float], object]) -> None:
        """As `ask`, for what nobody waits for."""
        self._post.send(node, DIRECTORY, self._serve, node, question, None)

    def lose(self, for_s: float) -> None:
        """It answers nobody for so long, and comes back knowing nothing: a Redis that was restarted without its data."""
        self.table = LocalDirectory()
        self._away += 1
        self._events.later(for_s, self._back)

    def _back(self) -> None:
        self._away -= 1

    def _serve(self, node: str, question: Callable[[LocalDirectory, float], Any], asked: _Asked | None) -> None:
        if self._away:
            return
        try:
            answer = question(self.table, self._events.now())
        except StaleEpochError:
            return  # a newer self of the asker is there: the older one is about to end
        if asked is not None:
            self._post.send(DIRECTORY, node, asked.hear, answer)


class _Asked:
    __slots__ = ("_answered", "_directory", "timer")

    def __init__(self, directory: SimDirectory, answered: Callable[[Any], None]) -> None:
        self._directory = directory
        self._answered: Callable[[Any], None] | None = answered
        self.timer: Event | None = None

    def hear(self, answer: Any) -> None:
        """Once; later answers are nobody's."""
        answered, self._answered = self._answered, None
        if answered is None:
            return
        if answer is None:
            self._directory.unanswered += 1
        elif self.timer is not None:
            self.timer.cancel()
        answered(answer)


class Node(Protocol):
    """A worker or a store."""

    name: str
    epoch: int
    alive: bool
    inventory: Inventory

    def node_record(self) -> NodeRecord: ...


class SimAnnouncer:
    """Says that a node lives and which blocks came and went. `added` and `met` as in the product's."""

    def __init__(
        self,
        node: Node,
        directory: SimDirectory,
        events: Events,
        ttl_s: float,
        added: Callable[[Sequence[BlockKey]], None] = lambda keys: None,
        met: Callable[[Sequence[NodeRecord]], None] = lambda nodes: None,
    ) -> None:
        self._node = node
        self._directory = directory
        self._events = events
        self._ttl_s = ttl_s
        self._added = added
        self._met = met
        self._join_at = events.now()
        self._every_s = ttl_s / 3 / JOINS_WHILE_YOUNG
        self._pause_s = PAUSE_MIN_S
        self._everything = self._unknown = False  # all is to be said; the directory holds nothing of ours
        self._unsaid: Changes | None = None
        self._asking = False
        self._first_at: float | None = None  # of news that are being gathered
        self._latest_at = 0.0
        self._timer = events.later(0.0, self._turn)

    def poke(self) -> None:
        """Blocks may have come or gone."""
        self._latest_at = self._events.now()
        if self._first_at is None:
            self._first_at = self._latest_at
            if not self._asking and self._pause_s == PAUSE_MIN_S:
                self._rest()

    def again(self) -> None:
        """Everything is to be announced anew, and `added` to hear of it."""
        self._everything = True
        self.poke()

    def _turn(self) -> None:
        now = self._events.now()
        if not self._node.alive:
            return
        if now >= self._join_at:
            self._join()
        elif self._first_at is not None and now < due_at(self._first_at, self._latest_at):
            self._rest()
        else:
            self._announce()

    def _join(self) -> None:
        self._asking = True
        record, ttl_s = self._node.node_record(), self._ttl_s
        self._directory.ask(
            self._node.name, lambda table, now: (table.join(record, ttl_s, now), table.nodes(now)), self._joined
        )

    def _joined(self, answer: tuple[bool, list[NodeRecord]] | None) -> None:
        if answer is None:
            self._pause()
            return
        known, nodes = answer
        if not known:  # what was not heard is part of everything, or gone since
            self._everything, self._unknown, self._unsaid = True, True, None
        self._met(nodes)
        self._join_at = self._events.now() + self._every_s
        self._every_s = min(2 * self._every_s, self._ttl_s / 3)
        self._announce()

    def _announce(self) -> None:
        node, changes = self._node, self._unsaid
        if not node.alive:
            return
        if changes is None and self._everything and not self._unknown:
            self._begin_anew()
            return
        self._first_at, self._unknown = None, False
        if changes is None:
            changes = self._unsaid = node.inventory.changes(KEYS_MAX, everything=self._everything)
            self._everything = False
            if changes.added:
                self._added(changes.added)
        delta, count = Delta(pack(changes.added), b"", pack(changes.removed), b""), len(changes.added) + len(changes.removed)
        if not count:
            self._unsaid, self._pause_s = None, PAUSE_MIN_S
            self._rest()
            return
        self._asking = True
        self._directory.ask(
            node.name,
            lambda table, now: table.announce(node.name, node.epoch, delta, now),
            lambda known: self._announced(known, count),
        )

    def _begin_anew(self) -> None:
        """What it knows of us is forgotten first: removals that were not said yet are not part of everything."""
        node, ttl_s = self._node, self._ttl_s
        self._asking = True

        def question(table: LocalDirectory, now: float) -> bool:
            table.leave(node.name, node.epoch, now)
            table.join(node.node_record(), ttl_s, now)
            return True

        self._directory.ask(node.name, question, self._begun)

    def _begun(self, answer: bool | None) -> None:
        self._unknown = answer is not None
        if self._unknown:
            self._announce()
        else:
            self._pause()

    def _announced(self, known: bool | None, count: int) -> None:
        if known is None:
            self._pause()
            return
        self._unsaid, self._pause_s = None, PAUSE_MIN_S
        if not known:
            self._everything = True
            self._join()
        elif count >= KEYS_MAX:
            self._announce()
        else:
            self._rest()

    def _pause(self) -> None:
        """Nobody listened: it joins again after a while, and says then what it could not say now."""
        self._join_at = self._events.now() + self._pause_s
        self._pause_s = min(2 * self._pause_s, PAUSE_MAX_S)
        self._wake_at(self._join_at)

    def _rest(self) -> None:
        """Until the next join, or until news are due."""
        due = float("inf") if self._first_at is None else due_at(self._first_at, self._latest_at)
        self._wake_at(min(self._join_at, due))

    def _wake_at(self, when: float) -> None:
        self._asking = False
        self._timer.cancel()
        self._timer = self._events.at(when, self._turn)
