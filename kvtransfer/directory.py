"""The directory of the KV plane: who probably holds which block. A hint: a stale entry costs a miss, never a wrong byte.

Forms: ClockedDirectory over a LocalDirectory in this process, RemoteDirectory (the service that the controller offers, the
default) and RedisDirectory (when a Redis is configured). All of them pass tests/contract/test_directory.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol

from core.blocks import BlockKey, KvLayout, KvSource
from core.errors import TandemError
from core.request import WorkerRole

LOCATE_KEYS_MAX = 65_536
"""Of one `locate`: a prompt of a million tokens in blocks of 16."""


class DirectoryError(TandemError):
    """The directory did not answer in time, or not sensibly. Go on without it: whatever was asked for is a miss."""

    code, retryable, grpc_status, http_status = "directory", True, "UNAVAILABLE", 503


class DuplicateNodeError(TandemError):
    """Another process calls itself by this id and epoch. Trying again cannot help while both run."""

    code, grpc_status, http_status = "duplicate_node", "ALREADY_EXISTS", 409


class Tier(IntEnum):
    """Where a node has a block, quickest first; the numbers of `tandem.v1.Tier`."""

    DRAM = 0
    DISK = 1


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """Where a node is and what its blocks look like. `source` carries its id and epoch."""

    source: KvSource
    layout: KvLayout | None
    """None: a store node that has not seen a block yet."""
    role: WorkerRole


class Holder(NamedTuple):
    worker_id: str
    epoch: int
    tier: Tier


class Located(NamedTuple):
    """`holders[i]` hold `keys[i]`, in no order that means anything; the list ends before the first key that nobody holds.

    `nodes` has the record of every worker id that is named, all of them alive as far as the directory knows.
    """

    nodes: Mapping[str, NodeRecord]
    holders: Sequence[tuple[Holder, ...]]


NOWHERE = Located({}, ())


class Directory(Protocol):
    """Every call ends within the directory's own deadline (`store.directory_timeout_s`) and raises DirectoryError when it
    could not be answered by then; none raises anything else but what is named here. Cancelling any of them is safe.
    """

    async def join(self, record: NodeRecord, ttl_s: float) -> bool:
        """Says that a node lives, for `ttl_s` more; to be called again every third of that.

        False: not everything this incarnation announced is remembered (it is new, its time ran out, the directory
        restarted): announce all of it again. A higher epoch of the same id replaces the older one and forgets what that
        held. Raises StaleEpochError when a higher epoch has joined, DuplicateNodeError when another address has this id
        and epoch.
        """
        ...

    async def leave(self, worker_id: str, epoch: int) -> None:
        """Forgets an incarnation and what it held. Unknown ones are fine."""
        ...

    async def announce(
        self, worker_id: str, epoch: int, added: Sequence[tuple[BlockKey, Tier]], removed: Sequence[tuple[BlockKey, Tier]]
    ) -> bool:
        """Keys that came and went; a key in both lists is held afterwards. Any number of them, each at most once a list.

        False: this incarnation is not known (any more), nothing was taken: join, and announce everything. Idempotent:
        after a DirectoryError, of which part may have been taken, say it again or wait for `join` to ask for everything.
        """
        ...

    async def locate(self, keys: Sequence[BlockKey]) -> Located:
        """Who holds these keys, until the first that nobody does; of more than LOCATE_KEYS_MAX only so many are looked up."""
        ...

    async def nodes(self) -> list[NodeRecord]:
        """All nodes alive, by worker id."""
        ...

    async def close(self) -> None:
        """Lets go of connections. Does not `leave`. Idempotent; other calls raise DirectoryError afterwards."""
        ...
