"""Which transports to try for a pair of workers, in which order. Deciding code."""

from __future__ import annotations

from collections.abc import Collection

from core.blocks import KvSource
from core.errors import TransferError

PREFERENCE = ("shm", "tcp", "grpc")
"""What `auto` tries: the quickest first. Loopback is only used when it is named: it needs both ends in one process."""
LAST_RESORT = "grpc"


def transport_order(
    configured: str, here: Collection[str], host_id: str, source: KvSource, failing: Collection[str] = ()
) -> tuple[str, ...]:
    """Transports for pulling from `source`, best first.

    `configured` is "auto" or a name: then that one, and behind it only the last resort, gRPC, which reaches everything.
    `here` is what this end supports; `failing` names those that failed with this source lately: they come last. Raises
    TransferError when the two ends have nothing in common.
    """
    wanted = PREFERENCE if configured == "auto" else tuple(dict.fromkeys((configured, LAST_RESORT)))
    usable = [name for name in wanted if name in here and name in source.transports and _reaches(name, host_id, source)]
    if not usable:
        raise TransferError(
            f"no transport reaches {source.worker_id}: it offers {', '.join(source.transports) or 'none'},"
            f" here are {', '.join(sorted(here)) or 'none'}, transfer.transport is {configured}"
        )
    return tuple(sorted(usable, key=lambda name: name in failing))


def _reaches(name: str, host_id: str, source: KvSource) -> bool:
    match name:
        case "shm":
            return bool(source.arena_path and source.host_id == host_id)
        case "tcp":
            return bool(source.tcp_address)
        case _:
            return True
