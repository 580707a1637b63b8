"""Tandem's client SDK: `from tandem import Client, AsyncClient, SamplingParams`.

Names load when they are first used (PEP 562), so that `import tandem.sampling` costs a server no client code.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tandem.aio import AsyncClient, AsyncTokenStream
    from tandem.client import Client, TokenStream
    from tandem.connection import Tls
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
    from tandem.explanation import Explanation
    from tandem.results import Choice, Model, Placement, Result, Timing, Token, TopLogprob, Usage
    from tandem.sampling import SamplingParams

_HOMES = {
    "tandem.client": ("Client", "TokenStream"),
    "tandem.aio": ("AsyncClient", "AsyncTokenStream"),
    "tandem.connection": ("Tls",),
    "tandem.sampling": ("SamplingParams",),
    "tandem.explanation": ("Explanation",),
    "tandem.results": ("Choice", "Model", "Placement", "Result", "Timing", "Token", "TopLogprob", "Usage"),
    "tandem.errors": (
        "AuthenticationError",
        "CancelledError",
        "DeadlineExceededError",
        "InternalError",
        "InvalidRequestError",
        "NotFoundError",
        "OverloadedError",
        "PermissionDeniedError",
        "PromptTooLongError",
        "QuotaExceededError",
        "RequestTooLargeError",
        "SloUnattainableError",
        "TandemError",
        "UnavailableError",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [  # noqa: RUF022 - what most users need comes first
    "Client",
    "AsyncClient",
    "SamplingParams",
    "Token",
    "Result",
    "Choice",
    "Usage",
    "Timing",
    "Placement",
    "TopLogprob",
    "Model",
    "Explanation",
    "Tls",
    "TokenStream",
    "AsyncTokenStream",
    "TandemError",
    "AuthenticationError",
    "CancelledError",
    "DeadlineExceededError",
    "InternalError",
    "InvalidRequestError",
    "NotFoundError",
    "OverloadedError",
    "PermissionDeniedError",
    "PromptTooLongError",
    "QuotaExceededError",
    "RequestTooLargeError",
    "SloUnattainableError",
    "UnavailableError",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
