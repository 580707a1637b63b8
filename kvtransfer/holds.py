"""What reading by key asks of its callers, and the bounds a node keeps. Holders call themselves `hold/WORKER/N`, attempt 1."""

from __future__ import annotations

import math
from collections.abc import Sequence

from core.blocks import KEY_BYTES, BlockKey, Closing
from core.errors import InvalidRequestError

HOLD_KEYS_MAX = 4096
HOLDS_MAX = 1024
HOLD_LEASE_MAX_S = 60.0
NOTHING_FOLLOWS = Closing(0, (), finished=True)
"""A hold is a hand-off that is closed from the start."""


def granted_s(lease_s: float) -> float:
    """The lease a holder gets. Raises InvalidRequestError for what is no length of time."""
    if not (math.isfinite(lease_s) and lease_s > 0):
        raise InvalidRequestError(f"a lease of {lease_s:g} s holds nothing; ask for a positive number of seconds")
    return min(lease_s, HOLD_LEASE_MAX_S)


def check_keys(keys: Sequence[BlockKey]) -> None:
    """Raises InvalidRequestError for too many keys, or such as can be none of ours."""
    if len(keys) > HOLD_KEYS_MAX:
        raise InvalidRequestError(f"{len(keys)} keys in one call; ask for at most {HOLD_KEYS_MAX}")
    wrong = next((key for key in keys if len(key) != KEY_BYTES), None)
    if wrong is not None:
        raise InvalidRequestError(f"a block key has {KEY_BYTES} bytes, got one of {len(wrong)}")
