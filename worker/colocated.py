"""The colocated role: whole requests on one worker, prompts in chunks beside the running streams."""

from __future__ import annotations

from core.request import WorkItem
from engine.role import Shortage, Terms


class ColocatedRole:
    """Fills every step to the brim and, short of memory, keeps its own victims: there is nowhere better to send them."""

    def enter(self, item: WorkItem, resident: bool) -> Terms:
        return Terms(hand_over=False)

    def prefill_tokens(self, left: int, decode_rows: int) -> int:
        return left

    def on_shortage(self) -> Shortage:
        return Shortage.REQUEUE
