"""The two state machines of a hand-off. Deciding code: events and `now` come as arguments, drivers carry out what is said.

    Export, at the source:   opened ─ announce ─▶ announcing ─ close ─▶ closed ─ done ─▶ done
                                └────────┴─── revoke, a time without sign of the puller ──┴──▶ revoked | expired

An export remembers all it announced, so a follower that comes late or again is told everything, and being told twice does
no harm: the ingest drops what it knows.

    Ingest, at the puller, per block of the request:   unknown ─ announced ─▶ in flight ─ landed ─▶ landed
                                                          ▲                       │ lost (handed out again at the source)
                                                          └───────────────────────┘ until it is announced anew
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from enum import Enum

from core.blocks import BlockKey, BlockRecord, Closing, blocks_for
from core.errors import TransferError
from core.request import AttemptKey


class ExportState(Enum):
    OPENED = "opened"
    ANNOUNCING = "announcing"
    CLOSED = "closed"
    DONE = "done"
    EXPIRED = "expired"
    REVOKED = "revoked"


_ENDED = frozenset({ExportState.DONE, ExportState.EXPIRED, ExportState.REVOKED})


@dataclass(frozen=True, slots=True)
class News:
    """What a follower has not been told: blocks, then the closing record, or why there is nothing more to come."""

    records: tuple[BlockRecord, ...] = ()
    closing: Closing | None = None
    ended: str | None = None


class Export:
    """One attempt's blocks on offer. `until` is when it ends unless somebody announces or renews before."""

    def __init__(self, key: AttemptKey, lease_s: float, now: float) -> None:
        self.key = key
        self.lease_s = lease_s
        self.until = now + lease_s
        self.state = ExportState.OPENED
        self.records: list[BlockRecord] = []
        self.closing: Closing | None = None
        self.reason = ""
        self._places: set[tuple[int, int]] = set()

    @property
    def ended(self) -> bool:
        return self.state in _ENDED

    def announce(self, records: Iterable[BlockRecord], now: float) -> bool:
        """False when nobody is to hear of them any more. A block computed again is simply announced again."""
        if self.ended:
            return False
        assert self.state is not ExportState.CLOSED, f"{self.key} announces blocks after its closing record"
        self._add(records)
        self.state = ExportState.ANNOUNCING
        self.until = now + self.lease_s
        return True

    def close(self, closing: Closing, partial: BlockRecord | None, now: float) -> bool:
        """Nothing more will be announced. False when the export has ended: its blocks need no lease."""
        if self.ended:
            return False
        assert self.state is not ExportState.CLOSED, f"{self.key} is closed twice"
        if partial is not None:
            self._add([partial])
        self.closing = closing
        self.state = ExportState.CLOSED
        self.until = now + self.lease_s
        return True

    def renew(self, now: float) -> bool:
        if self.ended:
            return False
        self.until = max(self.until, now + self.lease_s)
        return True

    def done(self) -> bool:
        """The puller needs nothing more. False when the export had ended already."""
        return self._end(ExportState.DONE, "the puller is done")

    def revoke(self, reason: str) -> bool:
        return self._end(ExportState.REVOKED, reason)

    def expire(self, now: float) -> bool:
        """True when its time is up and this call ended it."""
        return now >= self.until and self._end(ExportState.EXPIRED, f"no sign of a puller for {self.lease_s:g} s")

    def news(self, told: int, told_closing: bool) -> News:
        """What remains to be told to a follower that knows the first `told` records."""
        if self.ended:
            return News(ended=self.reason)
        return News(tuple(self.records[told:]), None if told_closing else self.closing)

    def offers(self, record: BlockRecord) -> bool:
        """Whether this very block, of this generation, was announced and may still be read."""
        return not self.ended and (record.block_id, record.generation) in self._places

    def offers_all(self, places: Iterable[tuple[int, int]]) -> bool:
        """The same for many at once, as (block id, generation)."""
        return not self.ended and self._places.issuperset(places)

    def _add(self, records: Iterable[BlockRecord]) -> None:
        for record in records:
            self.records.append(record)
            self._places.add((record.block_id, record.generation))

    def _end(self, state: ExportState, reason: str) -> bool:
        if self.ended:
            return False
        self.state, self.reason = state, reason
        return True


class Ingest:
    """What is to be pulled for one attempt, and what has become of it.

    `keys` are the keys of the full blocks as the puller computed them from its own tokens; a record that claims another is
    refused. `local` are the places of blocks that are here already. Raises TransferError from any method when the source
    says what cannot be; the hand-off has failed then.
    """

    def __init__(self, keys: Sequence[BlockKey], num_tokens: int, block_size: int, local: Set[int] = frozenset()) -> None:
        assert len(keys) == num_tokens // block_size, "one key per full block"
        self._keys = tuple(keys)
        self._num_tokens = num_tokens
        self._block_size = block_size
        self._missing = set(range(blocks_for(num_tokens, block_size))) - local
        self._pending: dict[int, BlockRecord] = {}  # announced, not yet asked for; newest record per place
        self._in_flight: dict[int, BlockRecord] = {}
        self._newer: dict[int, BlockRecord] = {}  # announced anew while an older block of the place is in flight
        self._lost: set[tuple[int, int, int]] = set()
        self.closing: Closing | None = None

    @property
    def complete(self) -> bool:
        """The source is through, and every block is here or no longer needed."""
        return self.closing is not None and (self.closing.finished or not self._missing)

    @property
    def missing(self) -> frozenset[int]:
        return frozenset(self._missing)

    def announced(self, records: Iterable[BlockRecord]) -> None:
        """Takes note of what can be pulled. Repetition and any order are harmless."""
        for record in records:
            self._check(record)
            known = self._in_flight.get(record.index)
            if record.index not in self._missing or _place(record) in self._lost:
                continue
            if known is None:
                self._pending[record.index] = record
            elif _place(known) != _place(record):
                self._newer[record.index] = record
        self._check_obtainable()

    def closed(self, closing: Closing) -> None:
        """No place is announced for the first time after this."""
        if not closing.finished and closing.num_tokens != self._num_tokens:
            raise TransferError(f"the source closed with {closing.num_tokens} tokens, {self._num_tokens} were expected")
        self.closing = closing
        self._check_obtainable()

    def take(self) -> tuple[BlockRecord, ...]:
        """What to pull now, in order of place; it is in flight from here on."""
        taken = tuple(self._pending[index] for index in sorted(self._pending))
        self._in_flight.update(self._pending)
        self._pending.clear()
        return taken

    def landed(self, index: int) -> None:
        """The block in flight has arrived and was checked."""
        del self._in_flight[index]
        self._newer.pop(index, None)
        self._missing.discard(index)

    def returned(self, records: Iterable[BlockRecord], lost: Set[int] = frozenset()) -> None:
        """Those in flight did not arrive. The places in `lost` held other blocks by then: only a new record helps there."""
        for record in records:
            del self._in_flight[record.index]
            newer = self._newer.pop(record.index, None)
            if record.index in lost:
                self._lost.add(_place(record))
            if newer is not None:
                self._pending[record.index] = newer
            elif record.index not in lost:
                self._pending[record.index] = record
        self._check_obtainable()

    def _check(self, record: BlockRecord) -> None:
        full = record.index < len(self._keys)
        if not 0 <= record.index < blocks_for(self._num_tokens, self._block_size):
            raise TransferError(f"block {record.index} was announced, {self._num_tokens} tokens were asked for")
        if record.key != (self._keys[record.index] if full else b""):
            raise TransferError(f"block {record.index} was announced under a key that is not that of our tokens")
        tokens = self._block_size if full else self._num_tokens % self._block_size
        if record.num_tokens != tokens:
            raise TransferError(f"block {record.index} was announced with {record.num_tokens} tokens, has {tokens}")

    def _check_obtainable(self) -> None:
        """After the closing record every missing block is known, or it never will be."""
        if self.closing is None or self.closing.finished:
            return
        never = self._missing - self._pending.keys() - self._in_flight.keys()
        if never:
            raise TransferError(f"the source closed without a readable block for places {sorted(never)[:8]}")


def _place(record: BlockRecord) -> tuple[int, int, int]:
    return record.index, record.block_id, record.generation
