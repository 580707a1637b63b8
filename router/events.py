"""What can happen to a journey, and what it asks its driver to do. Frozen values; no behaviour.

Events of workers carry the attempt they belong to, so that whatever an older attempt still says can be told apart.
What is made per token is a tuple: a frozen dataclass costs three times as much.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from core.blocks import KvTicket
from core.errors import TandemError
from core.request import AttemptKey, AttemptTiming, FinishReason, TokenEvent, WorkItem

# ---- events ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Woken:
    """The journey's turn in the queue has come, or capacity may have come free: ask for a place."""


@dataclass(frozen=True, slots=True)
class Placed:
    """Answer to `Place`. `prefill` None: `decode` (or a colocated worker) computes the whole request."""

    prefill: str | None
    decode: str
    hold_until: float | None = None
    """The first token may be kept until then, so that the second one follows it closely."""


@dataclass(frozen=True, slots=True)
class NoPlace:
    """Answer to `Place`: nobody can take it now, `reason` for the user should the wait end without a place.

    `busy`: there are workers, without room; otherwise nobody is connected who could.
    """

    reason: str
    busy: bool = True


@dataclass(frozen=True, slots=True)
class Reserved:
    worker: str
    attempt: int
    granted: bool
    reason: str = ""
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Opened:
    worker: str
    attempt: int
    ticket: KvTicket
    cached_tokens: int = 0


class Tokens(NamedTuple):
    worker: str
    attempt: int
    tokens: tuple[TokenEvent, ...]


@dataclass(frozen=True, slots=True)
class PrefillDone:
    worker: str
    attempt: int
    timing: AttemptTiming
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Joined:
    worker: str
    attempt: int
    timing: AttemptTiming


@dataclass(frozen=True, slots=True)
class AttemptFailed:
    """The worker holds nothing of the attempt any more."""

    worker: str
    attempt: int
    error: TandemError
    retryable: bool


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """Session broken, process dead or incarnation replaced: nothing can be sent to it and nothing will come."""

    worker: str
    reason: str = "the connection broke"


@dataclass(frozen=True, slots=True)
class StopMatched:
    """The router, which alone sees text, found a stop string."""


@dataclass(frozen=True, slots=True)
class ClientCancelled:
    pass


@dataclass(frozen=True, slots=True)
class Refused:
    """Answer to `Place`, or to waiting: it will not be served."""

    error: TandemError


@dataclass(frozen=True, slots=True)
class Tick:
    """Time alone: the journey's `wake_at` has come."""


WorkerEvent = Reserved | Opened | Tokens | PrefillDone | Joined | AttemptFailed
Event = Woken | Placed | NoPlace | WorkerEvent | WorkerLost | StopMatched | ClientCancelled | Refused | Tick

# ---- commands -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Place:
    """Choose workers, none of `avoid`, and answer with Placed or NoPlace."""

    avoid: frozenset[str]


@dataclass(frozen=True, slots=True)
class SendReserve:
    worker: str
    item: WorkItem


@dataclass(frozen=True, slots=True)
class SendStartPrefill:
    worker: str
    item: WorkItem


@dataclass(frozen=True, slots=True)
class SendOpenHandoff:
    worker: str
    key: AttemptKey
    ticket: KvTicket


@dataclass(frozen=True, slots=True)
class SendGenerateLocal:
    worker: str
    item: WorkItem


@dataclass(frozen=True, slots=True)
class SendCancel:
    worker: str
    key: AttemptKey


@dataclass(frozen=True, slots=True)
class Accepted:
    """A worker took the attempt: the request no longer waits for a place."""


@dataclass(frozen=True, slots=True)
class Deliver:
    """Tokens at the next positions, each position once over the whole journey."""

    tokens: tuple[TokenEvent, ...]


@dataclass(frozen=True, slots=True)
class Finish:
    """The last command of a journey. Exactly one of the two is set."""

    reason: FinishReason | None = None
    error: TandemError | None = None


Send = SendReserve | SendStartPrefill | SendOpenHandoff | SendGenerateLocal | SendCancel
Command = Place | Send | Accepted | Deliver | Finish
