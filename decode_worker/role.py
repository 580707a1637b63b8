"""The decode role: continues what others have computed, and whole short requests beside it."""

from __future__ import annotations

from core.request import WorkItem
from engine.role import Shortage, Terms


class DecodeRole:
    """Streams come first: beside them a step computes at most `chunk_tokens` of a local prompt, so that no token gap
    grows by more than such a chunk. What memory has no room for goes back to the router, which knows roomier places.
    """

    def __init__(self, chunk_tokens: int = 64) -> None:
        assert chunk_tokens > 0, "local prompts must get on"
        self._chunk_tokens = chunk_tokens

    def enter(self, item: WorkItem, resident: bool) -> Terms:
        return Terms(hand_over=False)

    def prefill_tokens(self, left: int, decode_rows: int) -> int:
        return min(left, self._chunk_tokens) if decode_rows else left

    def on_shortage(self) -> Shortage:
        return Shortage.GIVE_BACK
