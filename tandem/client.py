"""The blocking client, on gRPC's own threads: no hidden event loop."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar, Unpack

import grpc

from tandem._assembly import Assembly
from tandem._convert import Prompt, RequestOptions, error_from_rpc, model_from_pb, request_to_pb
from tandem._explain import explanation_from_pb
from tandem.connection import CHANNEL_OPTIONS, Connection, RetryPolicy, Tls
from tandem.errors import CancelledError, TandemError, UnavailableError
from tandem.explanation import Explanation
from tandem.results import Model, Result, Token
from tandem.sampling import SamplingParams
from tandem.v1 import inference_pb2 as inference
from tandem.v1 import inference_pb2_grpc as stubs

_T = TypeVar("_T")


class Client:
    """Talks to one router. Thread-safe; close it or use it as a context manager.

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
        credentials = self._connection.credentials()
        if credentials is None:
            self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        else:
            self._channel = grpc.secure_channel(address, credentials, options=CHANNEL_OPTIONS)
        self._stub = stubs.InferenceStub(self._channel)  # type: ignore[no-untyped-call]
        self._closed = threading.Event()

    def stream(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        timeout_s: float | None = None,
        **options: Unpack[RequestOptions],
    ) -> TokenStream:
        """Starts a request; iterate over the result for its tokens.

        `prompt` is text, token ids, or chat messages (`{"role": …, "content": …}`); `options` as in `RequestOptions`.
        Raises InvalidRequestError at once for values
        that cannot be served; every other TandemError comes from the iteration.
        """
        request = request_to_pb(prompt, sampling, options)
        timeout_s = self._connection.timeout_s if timeout_s is None else timeout_s
        return TokenStream(self._stub.Generate, request, self._connection, timeout_s, self._closed)

    def generate(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        timeout_s: float | None = None,
        **options: Unpack[RequestOptions],
    ) -> Result:
        """The whole answer at once; takes what `stream` takes."""
        with self.stream(prompt, sampling, timeout_s=timeout_s, **options) as stream:
            for _ in stream:
                pass
            return stream.result

    def cancel(self, request_id: str, *, timeout_s: float = 10.0) -> bool:
        """Ends a running request, whoever started it. False: the router knows none by this id."""
        request = inference.CancelRequest(request_id=request_id)
        return bool(
            self._call(lambda: self._stub.Cancel(request, timeout=timeout_s, metadata=self._connection.metadata())).found
        )

    def model(self, *, timeout_s: float = 10.0) -> Model:
        """What the router serves."""
        request = inference.GetModelRequest()
        return model_from_pb(
            self._call(lambda: self._stub.GetModel(request, timeout=timeout_s, metadata=self._connection.metadata()))
        )

    def explain(self, request_id: str, *, timeout_s: float = 10.0) -> Explanation:
        """Why this request was placed where it was, what was predicted, and what came of it; `ID/1` is its second choice.

        Raises NotFoundError when the router has forgotten it or never saw it.
        """
        request = inference.ExplainRequest(request_id=request_id)
        metadata = self._connection.metadata()
        return explanation_from_pb(self._call(lambda: self._stub.Explain(request, timeout=timeout_s, metadata=metadata)))

    def close(self) -> None:
        """Ends every stream of this client; the server hears of it and frees what they hold. Idempotent."""
        self._closed.set()
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _call(self, call: Callable[[], _T]) -> _T:
        """One short call. Short calls may be repeated without harm."""
        retry, retries = self._connection.retry, 0
        while True:
            _refuse_closed(self._closed)
            try:
                return call()
            except grpc.RpcError as rpc_error:
                error = error_from_rpc(rpc_error, self._connection.address)
            if not isinstance(error, UnavailableError) or retries >= retry.max_retries:
                raise error
            self._closed.wait(retry.delay_s(retries))
            retries += 1


class TokenStream:
    """Tokens of one request, as an iterator and a context manager; `result` once they have all been read.

    Leaving the `with` block, dropping the object or interrupting the iteration cancels the request at the server. Use
    one stream from one thread; `cancel` may be called from any.
    """

    def __init__(
        self,
        start: Callable[..., Any],
        request: inference.GenerateRequest,
        connection: Connection,
        timeout_s: float | None,
        closed: threading.Event,
    ) -> None:
        self._start = start
        self._connection = connection
        self._closed = closed
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

    def __iter__(self) -> TokenStream:
        return self

    def __next__(self) -> Token:
        while not self._ready:
            if self._assembly.done:
                raise StopIteration
            try:
                self._read()
            except BaseException:  # also KeyboardInterrupt: nobody will read on, so the workers need not go on
                self._call.cancel()
                raise
        return self._ready.popleft()

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._assembly.done:
            self.cancel()

    def __del__(self) -> None:
        call = getattr(self, "_call", None)
        if call is not None:
            call.cancel()

    def _begin(self) -> Any:
        _refuse_closed(self._closed)
        timeout_s = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        try:
            return self._start(self._assembly.request, timeout=timeout_s, metadata=self._connection.metadata())
        except ValueError as error:  # gRPC's word for a channel that was closed meanwhile
            raise CancelledError(f"the client is closed ({error})") from None

    def _read(self) -> None:
        """Waits for one message, the end, or an error that can be tried again."""
        try:
            message = next(self._call, None)
        except grpc.RpcError as error:
            self._recover(error_from_rpc(error, self._connection.address))
            return
        if message is None:
            self._assembly.end()
        else:
            self._ready.extend(self._assembly.receive(message))

    def _recover(self, error: TandemError) -> None:
        if self._assembly.cancelled:
            self._assembly.stopped_by_caller()
            return
        self._closed.wait(self._assembly.fail(error))
        self._call = self._begin()


def _refuse_closed(closed: threading.Event) -> None:
    if closed.is_set():
        raise CancelledError("the client is closed; open a new one")
