"""Cancellation across grpc.aio, which can lose it."""

from __future__ import annotations

import asyncio


def heed_cancellation() -> None:
    """Raises asyncio.CancelledError when the running task has been told to end.

    A task that is cancelled while it waits for a call of grpc.aio to be set up hears of an RPC error instead, or of
    nothing: gRPC's own task takes the cancellation for its own. Whoever goes on after an RPC error asks here first.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
