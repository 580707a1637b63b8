"""How a client reaches a router: address, credentials, channel options, retries. Shared by both clients."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from tandem.errors import InvalidRequestError

# A long answer is one stream, so a silent peer is found by pings; reconnecting must be quicker than a retry gives up.
CHANNEL_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.use_local_subchannel_pool", 1),  # a connection per client, so that several spread over the routers of an address
    ("grpc.max_receive_message_length", 64 * 2**20),
    ("grpc.max_send_message_length", 64 * 2**20),
)


@dataclass(frozen=True, slots=True)
class Tls:
    """Paths of PEM files. `ca` None: the system's roots. `cert` and `key` prove the client's identity (mTLS)."""

    ca: str | None = None
    cert: str | None = None
    key: str | None = None


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Exponential back-off with full jitter; `max_retries` 0 turns retries off."""

    max_retries: int = 3
    first_delay_s: float = 0.1
    max_delay_s: float = 2.0

    def delay_s(self, retries_done: int) -> float:
        ceiling = min(self.max_delay_s, self.first_delay_s * 2.0**retries_done)
        return ceiling * random.uniform(0.5, 1.0)


@dataclass(frozen=True, slots=True)
class Connection:
    """Everything but the channel itself, which differs between the sync and the asyncio client."""

    address: str
    api_key: str | None = None
    tls: Tls | bool | None = None
    timeout_s: float | None = 600.0
    retry: RetryPolicy = RetryPolicy()

    def __post_init__(self) -> None:
        if not self.address or "://" in self.address:
            raise InvalidRequestError(f"the address must be HOST:PORT, got {self.address!r}")

    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.api_key}"),) if self.api_key else ()

    def credentials(self) -> grpc.ChannelCredentials | None:
        """None: plaintext. Raises InvalidRequestError for files that cannot be read."""
        if not self.tls:
            return None
        tls = Tls() if self.tls is True else self.tls
        if (tls.cert is None) != (tls.key is None):
            raise InvalidRequestError("mTLS needs both cert and key")
        return grpc.ssl_channel_credentials(_read(tls.ca), _read(tls.key), _read(tls.cert))


def _read(path: str | None) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InvalidRequestError(f"cannot read the TLS file {path}: {error.strerror}") from None
