"""What a codec raises for bytes that are no block."""

from __future__ import annotations

from core.errors import TransferError


class EncodingError(TransferError):
    """An encoded block is truncated, too long or not what its codec writes. It is dropped and taken from elsewhere."""

    code = "encoding"
