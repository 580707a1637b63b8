"""What passes on a worker session, as values: commands of a router, events of a worker. (P)"""

from __future__ import annotations

from dataclasses import dataclass

from core.blocks import KvTicket
from core.kv_changes import KvChanges
from core.request import AttemptKey, AttemptTiming, TokenEvent, WorkItem


@dataclass(frozen=True, slots=True)
class Hello:
    """First on both directions. A router also says which incarnation it expects and how long its attempts outlive it."""

    peer_id: str
    epoch: int
    expected_epoch: int = 0
    lease_s: float = 0.0


@dataclass(frozen=True, slots=True)
class StartPrefill:
    item: WorkItem

    @property
    def key(self) -> AttemptKey:
        return self.item.key


@dataclass(frozen=True, slots=True)
class Reserve:
    item: WorkItem

    @property
    def key(self) -> AttemptKey:
        return self.item.key


@dataclass(frozen=True, slots=True)
class GenerateLocal:
    item: WorkItem

    @property
    def key(self) -> AttemptKey:
        return self.item.key


@dataclass(frozen=True, slots=True)
class OpenHandoff:
    key: AttemptKey
    ticket: KvTicket


@dataclass(frozen=True, slots=True)
class CancelAttempt:
    key: AttemptKey


@dataclass(frozen=True, slots=True)
class FollowKv:
    """The router wants to hear of this worker's blocks, from the beginning."""

    stream: int


Opening = StartPrefill | Reserve | GenerateLocal
"""Commands that bring a new attempt to a worker."""
Command = Hello | Opening | OpenHandoff | CancelAttempt | FollowKv


@dataclass(frozen=True, slots=True)
class Reserved:
    key: AttemptKey
    granted: bool
    reason: str = ""
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Opened:
    key: AttemptKey
    ticket: KvTicket
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class StepTokens:
    """All tokens of one engine step that go to one router."""

    tokens: tuple[TokenEvent, ...]


@dataclass(frozen=True, slots=True)
class PrefillDone:
    key: AttemptKey
    timing: AttemptTiming
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Joined:
    key: AttemptKey
    timing: AttemptTiming


@dataclass(frozen=True, slots=True)
class AttemptFailed:
    key: AttemptKey
    code: str
    message: str
    retryable: bool


AttemptEvent = Reserved | Opened | PrefillDone | Joined | AttemptFailed
"""Events about one attempt."""
Event = Hello | StepTokens | KvChanges | AttemptEvent
