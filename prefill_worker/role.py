"""The prefill role: computes prompts, samples the first token, hands everything over."""

from __future__ import annotations

from core.errors import InvalidRequestError
from core.request import WorkItem
from engine.role import Shortage, Terms


class PrefillRole:
    """`lease_s`: how long handed-over blocks stay without a sign of life from who pulls them."""

    def __init__(self, lease_s: float) -> None:
        assert lease_s > 0, "a hand-over needs time"
        self._terms = Terms(hand_over=True, lease_s=lease_s)

    def enter(self, item: WorkItem, resident: bool) -> Terms:
        if resident:
            raise InvalidRequestError(f"{item.key}: this worker computes prompts only; hand KV to a decode worker")
        return self._terms

    def prefill_tokens(self, left: int, decode_rows: int) -> int:
        return left  # nobody here waits for the next token of a stream

    def on_shortage(self) -> Shortage:
        return Shortage.REQUEUE
