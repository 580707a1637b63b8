"""What a gRPC server says to bytes that are not the message they should be: the caller's mistake, and no stack trace."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from core.errors import InvalidRequestError

Handler = Any  # grpc.RpcMethodHandler is generic in its stubs alone
Context = grpc.aio.ServicerContext[Any, Any]


class RefuseMalformed(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Parses single requests itself, so that invalid UTF-8 or a damaged message ends the call with INVALID_ARGUMENT.

    gRPC alone would answer UNKNOWN and log a stack trace for each. Streamed requests, which come from peers of ours, are
    left alone. A handler that yields its responses may yield them serialised.
    """

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]], details: grpc.HandlerCallDetails
    ) -> Handler:
        handler: Any = await continuation(details)
        if handler is None or handler.request_streaming or handler.request_deserializer is None:
            return handler
        if handler.unary_unary is not None and inspect.iscoroutinefunction(handler.unary_unary):
            return grpc.unary_unary_rpc_method_handler(_whole(handler), None, handler.response_serializer)
        if handler.unary_stream is not None and inspect.isasyncgenfunction(handler.unary_stream):
            return grpc.unary_stream_rpc_method_handler(_streamed(handler), None, _unless_bytes(handler.response_serializer))
        if handler.unary_stream is not None and inspect.iscoroutinefunction(handler.unary_stream):
            return grpc.unary_stream_rpc_method_handler(_written(handler), None, handler.response_serializer)
        return handler


def _unless_bytes(serialize: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
    """Answers that are a message's bytes already are sent as they are: copies less of what is large."""
    return lambda message: message if isinstance(message, bytes) else serialize(message)


def _whole(handler: Any) -> Callable[[bytes, Context], Awaitable[Any]]:
    async def answer(raw: bytes, context: Context) -> Any:
        return await handler.unary_unary(await _parsed(handler, raw, context), context)

    return answer


def _streamed(handler: Any) -> Callable[[bytes, Context], Awaitable[None]]:
    """For a handler that yields its responses. They are written from here, so that a client which hangs up closes the
    generator at once: gRPC leaves one that was cancelled while it wrote to the garbage collector."""

    async def answer(raw: bytes, context: Context) -> None:
        async with contextlib.aclosing(handler.unary_stream(await _parsed(handler, raw, context), context)) as responses:
            async for response in responses:
                await context.write(response)

    return answer


def _written(handler: Any) -> Callable[[bytes, Context], Awaitable[None]]:
    """For a handler that writes its responses through the context."""

    async def answer(raw: bytes, context: Context) -> None:
        await handler.unary_stream(await _parsed(handler, raw, context), context)

    return answer


async def _parsed(handler: Any, raw: bytes, context: Context) -> Any:
    try:
        return handler.request_deserializer(raw)
    except DecodeError:
        error = InvalidRequestError("the request is no valid message: text must be UTF-8, and every field of its declared type")
    context.set_trailing_metadata((("tandem-code", error.code),))
    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, error.message)
    raise AssertionError("abort raises")
