"""Puts in order what nodes say of their blocks: streams, numbers, gaps. Deciding code.

A stream is everything a node has and then what changes, in numbered portions (`core.kv_changes`). What belongs to an older
stream is ignored; a portion that is missing or broken asks for a new stream, a few times per session: a node that never gets
it right is believed nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from core.kv_changes import KvChanges
from router.block_index import BlockIndex

STREAMS_MAX = 8
"""Asked for in one session."""


@dataclass(slots=True)
class _Stream:
    number: int
    next: int = 1
    asked: int = 1
    given_up: bool = False


class KvEvents:
    """Feeds one index. `up` and `down` bracket a session; what each returns is the stream to ask for, None for nothing."""

    def __init__(self, index: BlockIndex) -> None:
        self.gaps = 0
        """Streams that had to begin anew."""
        self.portions = 0
        self._index = index
        self._streams: dict[str, _Stream] = {}
        self._last = 0

    def up(self, node: str) -> int:
        self._index.forget(node)
        self._last += 1  # never used again: what is left over from an older session is known by its number
        self._streams[node] = _Stream(self._last)
        return self._last

    def down(self, node: str) -> None:
        self._streams.pop(node, None)
        self._index.forget(node)

    def heard(self, node: str, changes: KvChanges) -> int | None:
        stream = self._streams.get(node)
        if stream is None or changes.stream != stream.number or stream.given_up:
            return None
        if changes.sequence != stream.next:
            return self.broken(node)
        stream.next += 1
        self.portions += 1
        self._index.heard(node, changes)
        return None

    def broken(self, node: str) -> int | None:
        """A portion could not be read, or one is missing: nothing of the node is believed until it has begun anew."""
        stream = self._streams.get(node)
        if stream is None or stream.given_up:
            return None
        self.gaps += 1
        self._index.forget(node)
        if stream.asked >= STREAMS_MAX:
            stream.given_up = True
            return None
        self._last += 1
        self._streams[node] = _Stream(self._last, asked=stream.asked + 1)
        return self._last
