"""The border between our errors and gRPC's, both ways, for the Kv service alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn, cast

import grpc

from core.errors import (
    DigestMismatchError,
    LayoutMismatchError,
    LeaseExpiredError,
    StaleEpochError,
    TransferError,
)
from kvtransfer.transport import BlocksGoneError
from tandem.errors import TandemError

CODE_METADATA = "tandem-code"
_INDICES_METADATA = "tandem-block-indices"
_INDICES_MAX = 256  # metadata is small; what is not named is found gone when it is read again
_KINDS: dict[str, type[TransferError]] = {
    kind.code: kind for kind in (StaleEpochError, LeaseExpiredError, DigestMismatchError, LayoutMismatchError)
}
_TRANSIENT = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN, grpc.StatusCode.RESOURCE_EXHAUSTED})


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: TandemError) -> NoReturn:
    """Ends a call with the error's status; its code travels in the trailing metadata."""
    metadata = [(CODE_METADATA, error.code)]
    if isinstance(error, BlocksGoneError):
        metadata.append((_INDICES_METADATA, ",".join(map(str, error.indices[:_INDICES_MAX]))))
    await context.abort(grpc.StatusCode[error.grpc_status], error.message, tuple(metadata))


def transfer_error(error: grpc.aio.AioRpcError, peer: str) -> TransferError:
    """What a failed call to a source means for a pull."""
    metadata = _metadata(error)
    code = metadata.get(CODE_METADATA, "")
    if code == BlocksGoneError.code:
        return BlocksGoneError([int(index) for index in metadata.get(_INDICES_METADATA, "").split(",") if index])
    kind = _KINDS.get(code, TransferError)
    return kind(f"{peer}: {error.details() or error.code().name}")


def is_refusal(error: grpc.aio.AioRpcError) -> bool:
    """Whether the peer itself said no, as opposed to a call that failed on its way."""
    return CODE_METADATA in _metadata(error)


def is_transient(error: grpc.aio.AioRpcError) -> bool:
    """Whether the call failed on its way, so that asking the same peer again may help."""
    return not is_refusal(error) and error.code() in _TRANSIENT


def _metadata(error: grpc.aio.AioRpcError) -> dict[str, str]:
    pairs = cast("Iterable[tuple[str, str | bytes]]", error.trailing_metadata() or ())
    return {name: value for name, value in pairs if isinstance(value, str)}
