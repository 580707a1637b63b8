"""What makes a worker a prefill, a decode or a colocated one: the answers a StepLoop asks for."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from core.request import WorkItem


@dataclass(frozen=True, slots=True)
class Terms:
    """What was agreed when an item entered. It holds until the item leaves, though the role may change meanwhile.

    `hand_over`: leave after the first token, with every block leased to the attempt's key for `lease_s`.
    """

    hand_over: bool
    lease_s: float = 0.0


class Shortage(Enum):
    """What becomes of the youngest sequence when memory runs out."""

    REQUEUE = "requeue"  # wait here and be computed again
    GIVE_BACK = "give_back"  # the router places it again


class Role(Protocol):
    def enter(self, item: WorkItem, resident: bool) -> Terms:
        """On which terms an item may enter; `resident` when its KV is handed in with it.

        Raises InvalidRequestError for what this role never takes.
        """
        ...

    def prefill_tokens(self, left: int, decode_rows: int) -> int:
        """How many prompt tokens a step may hold beside `decode_rows` one-token rows, of the `left` that fit: 1 to `left`."""
        ...

    def on_shortage(self) -> Shortage: ...
