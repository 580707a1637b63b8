"""The directory of the KV plane: who probably holds which block. A hint: a stale entry costs a miss, never a wrong byte.

Forms: ClockedDirectory over a LocalDirectory in this process, RemoteDirectory (the service that the controller offers, the
default) and RedisDirectory (when a Redis is configured). All of them pass tests/contract/test_directory.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol

from core.blocks import KEY_BYTES, BlockKey, KvLayout, KvSource
from core.config import StoreConfig
from core.errors import TandemError
from core.request import WorkerRole

LOCATE_KEYS_MAX = 65_536
"""Of one `locate`: a prompt of a million tokens in blocks of 16."""
ANNOUNCE_KEYS_MAX = 16_384
"""Of one message or script; longer announcements are sent in pieces, each with its own deadline."""


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
    """Every call ends within the directory's own deadline (`store.directory_timeout_s`; an announcement of many keys has
    one for each ANNOUNCE_KEYS_MAX of them) and raises DirectoryError when it could not be answered by then; none raises
    anything else but what is named here, and ValueError for a key that has not KEY_BYTES. Cancelling any of them is safe.
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

        False: this incarnation is not known (any more), nothing was taken: join, and announce everything. After a
        DirectoryError some of it may have been taken, and the next `join` answers False.
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


class Runs(NamedTuple):
    """A Located as it travels: `runs` say of how many keys in a row which (node, tier) pairs are the holders."""

    nodes: Sequence[NodeRecord]
    runs: Sequence[tuple[int, tuple[Holder, ...]]]

    def expand(self) -> Located:
        holders: list[tuple[Holder, ...]] = []
        for count, held_by in self.runs:
            holders += [held_by] * count
        return Located({record.source.worker_id: record for record in self.nodes}, holders)


class Delta(NamedTuple):
    """Keys of one announcement, 16 bytes each, one after another."""

    added_dram: bytes
    added_disk: bytes
    removed_dram: bytes
    removed_disk: bytes


def pack(keys: Sequence[BlockKey]) -> bytes:
    """Keys one after another. Raises ValueError when one of them has another length."""
    packed = b"".join(keys)
    if list(map(len, keys)).count(KEY_BYTES) != len(keys):
        raise ValueError(f"a block key has {KEY_BYTES} bytes")
    return packed


def pack_deltas(
    added: Sequence[tuple[BlockKey, Tier]], removed: Sequence[tuple[BlockKey, Tier]], keys_max: int = ANNOUNCE_KEYS_MAX
) -> Iterator[Delta]:
    """An announcement in pieces of at most `keys_max` keys, one at least; removals first, so that a key in both is held."""
    if not added and not removed:
        yield Delta(b"", b"", b"", b"")
    for start in range(0, len(removed), keys_max):
        yield Delta(b"", b"", *_by_tier(removed[start : start + keys_max]))
    for start in range(0, len(added), keys_max):
        yield Delta(*_by_tier(added[start : start + keys_max]), b"", b"")


def _by_tier(changes: Sequence[tuple[BlockKey, Tier]]) -> tuple[bytes, bytes]:
    return (
        pack([key for key, tier in changes if tier is Tier.DRAM]),
        pack([key for key, tier in changes if tier is Tier.DISK]),
    )


def open_directory(store: StoreConfig, redis_url: str, controller: str) -> Directory:
    """The directory that the configuration names: Redis when `redis_url` is given, else the controller's service.

    Connects when first asked, so this neither waits nor fails for a server that is away. Raises ConfigError for a URL that
    is none.
    """
    if redis_url:
        from kvtransfer.redis_directory import RedisDirectory

        return RedisDirectory(redis_url, timeout_s=store.directory_timeout_s)
    from kvtransfer.remote_directory import RemoteDirectory

    return RemoteDirectory(controller, timeout_s=store.directory_timeout_s)
