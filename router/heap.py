"""Names ordered by keys that may change: a heap whose outdated entries are dropped when they come up. Deciding code."""

from __future__ import annotations

import heapq

Key = tuple[float, ...]
SLACK_ENTRIES = 64


class KeyedHeap:
    """Every operation is O(log n), spread over the calls. Ties go by name."""

    def __init__(self) -> None:
        self._keys: dict[str, Key] = {}
        self._heap: list[tuple[Key, str]] = []

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, name: str) -> bool:
        return name in self._keys

    def set(self, name: str, key: Key) -> None:
        """Adds the name, or gives it another key."""
        if self._keys.get(name) != key:
            self._keys[name] = key
            heapq.heappush(self._heap, (key, name))
            self._tidy()

    def discard(self, name: str) -> None:
        self._keys.pop(name, None)
        self._tidy()

    def first(self) -> tuple[str, Key] | None:
        """The name with the smallest key."""
        heap = self._heap
        while heap:
            key, name = heap[0]
            if self._keys.get(name) == key:
                return name, key
            heapq.heappop(heap)
        return None

    def _tidy(self) -> None:
        """Keeps outdated entries fewer than live ones."""
        if len(self._heap) > 2 * len(self._keys) + SLACK_ENTRIES:
            self._heap = [(key, name) for name, key in self._keys.items()]
            heapq.heapify(self._heap)
