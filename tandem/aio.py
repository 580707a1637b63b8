"""The asyncio client: the same surface as `tandem.client`, awaited."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, TypeVar, Unpack

import grpc

from tandem._assembly import Assembly
from tandem._convert import Prompt, RequestOptions, error_from_rpc, model_from_pb, request_to_pb
from tandem._explain import explanation_from_pb
from tandem.cancelling import heed_cancellation
from tandem.connection import CHANNEL_OPTIONS, Connection, RetryPolicy, Tls
from tandem.errors import CancelledError, TandemError, UnavailableError
from tandem.explanation import Explanation
from tandem.results import Model, Result, Token
from tandem.sampling import SamplingParams
from tandem.v1 import inference_pb2 as inference
from tandem.v1 import inference_pb2_grpc as stubs

_T = TypeVar("_T")


class AsyncClient:
    """Talks to one router from one event loop; close it or use it as an async context manager.

    `timeout_s` bounds every call that does not set its own; None waits for ever. A call that could not be delivered is
    tried again up to `max_retries` times; one that has begun to answer never is.
    """

    def __init__(
        self,
        address: str,
        api_key: str | None = None,
        tls: Tls | bool | None = None,
        *,
        timeout_s: float | None = 600.0,
        max_retries: int = 3,
    ) -> None:
        self._connection = Connection(address, api_key, tls, timeout_s, RetryPolicy(max_retries))
        self._credentials = self._connection.credentials()
        self._channel: grpc.aio.Channel | None = None
        self._closed = False

    def stream(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        timeout_s: float | None = None,
        **options: Unpack[RequestOptions],
    ) -> AsyncTokenStream:
        """Starts a request; iterate with `async for` over the result for its tokens.

        `prompt` is text, token ids, or chat messages (`{"role": …, "content": …}`); `options` as in `RequestOptions`.
        Raises InvalidRequestError at once for values
        that cannot be served; every other TandemError comes from the iteration.
        """
        request = request_to_pb(prompt, sampling, options)
        timeout_s = self._connection.timeout_s if timeout_s is None else timeout_s
        return AsyncTokenStream(self._start, request, self._connection, timeout_s)

    async def generate(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        timeout_s: float | None = None,
        **options: Unpack[RequestOptions],
    ) -> Result:
        """The whole answer at once; takes what `stream` takes."""
        async with self.stream(prompt, sampling, timeout_s=timeout_s, **options) as stream:
            async for _ in stream:
                pass
            return stream.result

    async def cancel(self, request_id: str, *, timeout_s: float = 10.0) -> bool:
        """Ends a running request, whoever started it. False: the router knows none by this id."""
        request = inference.CancelRequest(request_id=request_id)
        reply = await self._call(lambda: self._stub().Cancel(request, timeout=timeout_s, metadata=self._connection.metadata()))
        return bool(reply.found)

    async def model(self, *, timeout_s: float = 10.0) -> Model:
        """What the router serves."""
        request = inference.GetModelRequest()
        return model_from_pb(
            await self._call(lambda: self._stub().GetModel(request, timeout=timeout_s, metadata=self._connection.metadata()))
        )

    async def explain(self, request_id: str, *, timeout_s: float = 10.0) -> Explanation:
        """Why this request was placed where it was, what was predicted, and what came of it; `ID/1` is its second choice.

        Raises NotFoundError when the router has forgotten it or never saw it.
        """
        request = inference.ExplainRequest(request_id=request_id)
        metadata = self._connection.metadata()
        return explanation_from_pb(
            await self._call(lambda: self._stub().Explain(request, timeout=timeout_s, metadata=metadata))
        )

    async def close(self) -> None:
        """Ends every stream of this client; the server hears of it and frees what they hold. Idempotent."""
        self._closed = True
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close(None)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _stub(self) -> Any:
        if self._closed:
            raise CancelledError("the client is closed; open a new one")
        if self._channel is None:  # made on first use, because it belongs to the loop that is running then
            address = self._connection.address
            if self._credentials is None:
                self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
            else:
                self._channel = grpc.aio.secure_channel(address, self._credentials, options=CHANNEL_OPTIONS)
        return stubs.InferenceStub(self._channel)  # type: ignore[no-untyped-call]

    def _start(self, request: inference.GenerateRequest, timeout: float | None) -> Any:
        return self._stub().Generate(request, timeout=timeout, metadata=self._connection.metadata())

    async def _call(self, call: Callable[[], Awaitable[_T]]) -> _T:
        """One short call. Short calls may be repeated without harm."""
        retry, retries = self._connection.retry, 0
        while True:
            try:
                return await call()
            except grpc.RpcError as rpc_error:
                heed_cancellation()
                error = error_from_rpc(rpc_error, self._connection.address)
            if not isinstance(error, UnavailableError) or retries >= retry.max_retries:
                raise error
            await asyncio.sleep(retry.delay_s(retries))
            retries += 1


class AsyncTokenStream:
    """Tokens of one request, as an async iterator and context manager; `result` once they have all been read.

    Leaving the block, dropping the object or cancelling the task that iterates cancels the request at the server.
    """

    def __init__(
        self,
        start: Callable[[inference.GenerateRequest, float | None], Any],
        request: inference.GenerateRequest,
        connection: Connection,
        timeout_s: float | None,
    ) -> None:
        self._start = start
        self._connection = connection
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._assembly = Assembly(request, connection.retry)
        self._ready: deque[Token] = deque()
        self._call: Any = self._begin()

    @property
    def request_id(self) -> str:
        """Known from the start if the caller chose it, else once the first token is here."""
        return self._assembly.request_id

    @property
    def result(self) -> Result:
        """The whole answer, once the tokens have been read. Raises the error that ended the stream, if one did."""
        return self._assembly.result

    def cancel(self) -> None:
        """Ends the request here and on every worker; the iteration stops, `result` holds what came. Idempotent."""
        self._assembly.cancelled = True
        self._call.cancel()

    def __aiter__(self) -> AsyncTokenStream:
        return self

    async def __anext__(self) -> Token:
        while not self._ready:
            if self._assembly.done:
                raise StopAsyncIteration
            try:
                await self._read()
            except BaseException:  # also the cancellation of our task: nobody will read on
                self._call.cancel()
                raise
        return self._ready.popleft()

    async def __aenter__(self) -> AsyncTokenStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._assembly.done:
            self.cancel()

    def __del__(self) -> None:
        call = getattr(self, "_call", None)
        if call is not None and not call.done():
            call.cancel()

    def _begin(self) -> Any:
        timeout_s = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        return self._start(self._assembly.request, timeout_s)

    async def _read(self) -> None:
        """Waits for one message, the end, or an error that can be tried again."""
        try:
            message = await self._call.read()
        except grpc.RpcError as error:
            heed_cancellation()
            await self._recover(error_from_rpc(error, self._connection.address))
            return
        except asyncio.CancelledError:
            # gRPC raises it in the reader for our own `cancel` (and for a closed channel) too.
            heed_cancellation()
            await self._recover(CancelledError("the client was closed"))
            return
        if message is grpc.aio.EOF:  # type: ignore[attr-defined]
            self._assembly.end()
        else:
            self._ready.extend(self._assembly.receive(message))

    async def _recover(self, error: TandemError) -> None:
        if self._assembly.cancelled:
            self._assembly.stopped_by_caller()
            return
        await asyncio.sleep(self._assembly.fail(error))
        self._call = self._begin()
