"""What can go wrong, as users see it; the tree is drawn in the documentation of each class's `code`.

TandemError
├── InvalidRequestError ── PromptTooLongError
├── AuthenticationError, PermissionDeniedError, NotFoundError
├── RequestTooLargeError
├── OverloadedError (retryable, `retry_after_s`) ── QuotaExceededError, SloUnattainableError
├── CancelledError, DeadlineExceededError
├── UnavailableError (retryable)
└── InternalError
"""

from __future__ import annotations

from typing import ClassVar


class TandemError(Exception):
    """Base of every error of ours. The message tells the reader what to change.

    `code` travels over the wire (gRPC trailing metadata `tandem-code`, OpenAI error body `code`); `retryable` says
    whether the same call may succeed later; `grpc_status` is the name of a `grpc.StatusCode`.
    """

    code: ClassVar[str] = "error"
    retryable: ClassVar[bool] = False
    grpc_status: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s


class InvalidRequestError(TandemError):
    code, grpc_status, http_status = "invalid_request", "INVALID_ARGUMENT", 400


class PromptTooLongError(InvalidRequestError):
    code = "context_length_exceeded"


class AuthenticationError(TandemError):
    code, grpc_status, http_status = "unauthenticated", "UNAUTHENTICATED", 401


class PermissionDeniedError(TandemError):
    code, grpc_status, http_status = "permission_denied", "PERMISSION_DENIED", 403


class NotFoundError(TandemError):
    code, grpc_status, http_status = "not_found", "NOT_FOUND", 404


class RequestTooLargeError(TandemError):
    code, grpc_status, http_status = "request_too_large", "RESOURCE_EXHAUSTED", 413


class OverloadedError(TandemError):
    code, retryable, grpc_status, http_status = "overloaded", True, "RESOURCE_EXHAUSTED", 429


class QuotaExceededError(OverloadedError):
    """The tenant has used up its quota."""

    code = "quota_exceeded"


class SloUnattainableError(OverloadedError):
    """Refused early: the request would have missed its limits."""

    code = "slo_unattainable"


class CancelledError(TandemError):
    code, grpc_status, http_status = "cancelled", "CANCELLED", 499


class UnavailableError(TandemError):
    code, retryable, grpc_status, http_status = "unavailable", True, "UNAVAILABLE", 503


class DeadlineExceededError(TandemError):
    code, grpc_status, http_status = "deadline_exceeded", "DEADLINE_EXCEEDED", 504


class InternalError(TandemError):
    code = "internal"
