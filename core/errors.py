"""Every error of ours, each knowing whether a retry may help and how the two front doors say it.

TandemError (tandem/errors.py, public)
├── InvalidRequestError     the caller must change the request           INVALID_ARGUMENT   400
│   └── PromptTooLongError
├── AuthenticationError                                                  UNAUTHENTICATED    401
├── PermissionDeniedError                                                PERMISSION_DENIED  403
├── NotFoundError           no such model, request or worker             NOT_FOUND          404
├── RequestTooLargeError    the body itself                              RESOURCE_EXHAUSTED 413
├── OverloadedError         retry after `retry_after_s`                  RESOURCE_EXHAUSTED 429
│   ├── QuotaExceededError      of its tenant
│   └── SloUnattainableError    refused early, because it would miss its limits
├── CancelledError                                                       CANCELLED          499
├── UnavailableError        no worker can take it now                    UNAVAILABLE        503
├── DeadlineExceededError                                                DEADLINE_EXCEEDED  504
└── InternalError           our own mistake                              INTERNAL           500
below, for servers only:
├── ConfigError             configuration, model files, ports: the operator must change something
├── PinLimitError           so many blocks of one node may not be pinned
├── WorkerLostError         a peer of ours died; the journey places the request again
├── OutOfBlocksError        KV memory is short; retryable elsewhere or later
└── TransferError           bytes could not be moved; DigestMismatchError, StaleEpochError, LeaseExpiredError
"""

from __future__ import annotations

from tandem.errors import (
    AuthenticationError,
    CancelledError,
    DeadlineExceededError,
    InternalError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    PermissionDeniedError,
    PromptTooLongError,
    QuotaExceededError,
    RequestTooLargeError,
    SloUnattainableError,
    TandemError,
    UnavailableError,
)

__all__ = [
    "AuthenticationError",
    "CancelledError",
    "ConfigError",
    "DeadlineExceededError",
    "DigestMismatchError",
    "InternalError",
    "InvalidRequestError",
    "LayoutMismatchError",
    "LeaseExpiredError",
    "NotFoundError",
    "OutOfBlocksError",
    "OverloadedError",
    "PermissionDeniedError",
    "PinLimitError",
    "PromptTooLongError",
    "QuotaExceededError",
    "RequestTooLargeError",
    "SloUnattainableError",
    "StaleEpochError",
    "TandemError",
    "TransferError",
    "UnavailableError",
    "WorkerLostError",
]


class ConfigError(TandemError):
    code = "config"


class PinLimitError(TandemError):
    code, grpc_status, http_status = "pin_limit", "FAILED_PRECONDITION", 409


class WorkerLostError(TandemError):
    code, retryable, grpc_status, http_status = "worker_lost", True, "UNAVAILABLE", 503


class OutOfBlocksError(TandemError):
    code, retryable, grpc_status, http_status = "out_of_blocks", True, "RESOURCE_EXHAUSTED", 429


class TransferError(TandemError):
    code, retryable, grpc_status, http_status = "transfer", True, "UNAVAILABLE", 503


class DigestMismatchError(TransferError):
    code = "digest_mismatch"


class StaleEpochError(TransferError):
    code = "stale_epoch"


class LeaseExpiredError(TransferError):
    code = "lease_expired"


class LayoutMismatchError(TransferError):
    code, retryable = "layout_mismatch", False
