"""Reading a request's body within bounds, and noticing that its client has gone."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, ClassVar

from starlette.types import Receive, Scope

from core.errors import CancelledError, RequestTooLargeError, TandemError

READ_TIMEOUT_S = 30.0
"""For a whole body to arrive."""
DISCARD_TIMEOUT_S = 10.0
"""For the rest of a body that is too large: most clients read the answer only when they have sent it all."""


class BodyTimeoutError(TandemError):
    code: ClassVar[str] = "body_timeout"
    http_status: ClassVar[int] = 408


async def read_body(scope: Scope, receive: Receive, bytes_max: int) -> bytes:
    """The body, at most `bytes_max` long; more is never held in memory, whatever the client sends or announces.

    Raises RequestTooLargeError, BodyTimeoutError when it does not arrive in time, CancelledError when the client goes away.
    """
    headers = dict(scope["headers"])
    announced = headers.get(b"content-length", b"")
    too_large = announced.isdigit() and (len(announced) > 18 or int(announced) > bytes_max)
    if too_large and b"expect" in headers:
        raise _too_large(bytes_max)  # the client waits for our word before it sends the body
    chunks: list[bytes] = []
    try:
        async with asyncio.timeout(DISCARD_TIMEOUT_S if too_large else READ_TIMEOUT_S):
            too_large = not await _read(receive, chunks, 0 if too_large else bytes_max) or too_large
    except TimeoutError:
        if not too_large:
            raise BodyTimeoutError(f"the body did not arrive within {READ_TIMEOUT_S:g} s") from None
    if too_large:
        raise _too_large(bytes_max)
    return b"".join(chunks)


async def _read(receive: Receive, chunks: list[bytes], bytes_max: int) -> bool:
    """Fills `chunks`; beyond `bytes_max` drops them and the rest, and returns False."""
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise CancelledError("the client went away before its request was complete")
        more = message.get("more_body", False)
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > bytes_max:
            chunks.clear()
        else:
            chunks.append(chunk)
    return size <= bytes_max


def _too_large(bytes_max: int) -> RequestTooLargeError:
    return RequestTooLargeError(f"the body is larger than {bytes_max} bytes; shorten the prompt (router.max_body_bytes)")


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Runs `work` and cancels it when the client goes away, or when we are cancelled ourselves."""
    working = asyncio.create_task(work, name="http answer")
    leaving = asyncio.create_task(_gone(receive), name="http disconnect")
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
    if not working.cancelled():
        working.result()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
