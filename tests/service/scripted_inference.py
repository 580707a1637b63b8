"""A real gRPC server whose Inference answers are scripted by the prompt, on its own thread; for tests of the SDK."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from core.service import Registration, serve
from tandem import AsyncClient, Client, Result, Token
from tandem.v1 import common_pb2 as common
from tandem.v1 import inference_pb2 as pb
from tandem.v1 import inference_pb2_grpc as stubs

WAIT_S = 20.0
FINISHED = pb.Finished(
    usage=pb.Usage(prompt_tokens=3, cached_tokens=1, completion_tokens=2),
    timing=pb.Timing(queue_s=0.25, ttft_s=0.5),
    placement=pb.Placement(prefill="p-0", decode="d-0"),
    failovers=1,
)


def tokens(*texts: str, choice: int = 0, start: int = 0) -> pb.GenerateResponse:
    made = [
        pb.Token(choice=choice, position=start + i, token_id=100 + start + i, text=text, logprob=-0.5)
        for i, text in enumerate(texts)
    ]
    made[0].top_logprobs.add(token_id=7, logprob=-1.5)
    return pb.GenerateResponse(tokens=pb.TokenBatch(tokens=made))


def started(request: pb.GenerateRequest) -> pb.GenerateResponse:
    request_id = request.request_id or "made-by-router"
    return pb.GenerateResponse(
        started=pb.Started(request_id=request_id, prompt_tokens=3, seed=11, prompt_text="ask" if request.echo else "")
    )


def ended(choice: int = 0, reason: Any = common.FINISH_REASON_STOP, tail: str = "") -> pb.GenerateResponse:
    return pb.GenerateResponse(choice_finished=pb.ChoiceFinished(choice=choice, finish_reason=reason, tail_text=tail))


class ScriptedInference(stubs.InferenceServicer):
    """Does what the prompt's text says, and remembers what it was asked."""

    def __init__(self) -> None:
        self.requests: list[pb.GenerateRequest] = []
        self.metadata: list[dict[str, str]] = []
        self.cancelled = threading.Event()
        self.refusals = 0

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        script: Callable[..., AsyncIterator[pb.GenerateResponse]] = getattr(self, f"say_{request.text or 'hello'}")
        async with contextlib.aclosing(script(request, context)) as parts:  # type: ignore[type-var]
            async for part in parts:
                yield part

    async def say_hello(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        yield started(request)
        yield tokens("he")
        yield tokens("llo", start=1)
        yield ended()
        yield pb.GenerateResponse(finished=FINISHED)

    async def say_two(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        yield started(request)
        yield tokens("a", choice=1)
        yield tokens("b", "c")
        yield ended(1, common.FINISH_REASON_LENGTH, tail="!")
        yield ended(0)
        yield pb.GenerateResponse(finished=FINISHED)

    async def say_forever(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        try:
            yield started(request)
            yield tokens("x")
            await asyncio.Event().wait()
        finally:  # the cancel may arrive while the last token is still being written
            self.cancelled.set()

    async def say_flaky(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        if self.refusals > 0:
            self.refusals -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "not yet")
        async for part in self.say_hello(request, context):
            yield part

    async def say_broken(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        yield started(request)
        yield tokens("x")
        await context.abort(grpc.StatusCode.UNAVAILABLE, "worker gone", (("tandem-code", "unavailable"),))

    async def say_truncated(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        yield started(request)

    async def say_error(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        status, code, retry_after = request.slo_class.split(",")
        metadata = [("tandem-code", code)] * bool(code) + [("tandem-retry-after-s", retry_after)] * bool(retry_after)
        await context.abort(getattr(grpc.StatusCode, status), "said by the server", tuple(metadata))
        yield pb.GenerateResponse()

    async def Cancel(self, request: pb.CancelRequest, context: Any) -> pb.CancelResponse:
        return pb.CancelResponse(found=request.request_id == "known")

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:
        return pb.GetModelResponse(
            name="demo", version="1", max_model_len=512, vocab_size=99, fingerprint="ab", dtype="float32"
        )


@contextmanager
def serving(servicer: ScriptedInference) -> Iterator[str]:
    """The server lives on its own thread and loop, so that the blocking client can be tested from this one."""
    loop = asyncio.new_event_loop()
    address: list[str] = []
    up, down = threading.Event(), asyncio.Event()

    async def run() -> None:
        registration = Registration("tandem.v1.Inference", stubs.add_InferenceServicer_to_server, servicer)
        async with serve("127.0.0.1:0", registration, grace_s=0.1) as server:
            address.append(server.address)
            up.set()
            await down.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(run()), name="scripted-server")
    thread.start()
    try:
        assert up.wait(WAIT_S)
        yield address[0]
    finally:
        loop.call_soon_threadsafe(down.set)
        thread.join(WAIT_S)
        loop.close()


class Blocking:
    """Drives `Client`; `Awaited` below drives `AsyncClient` the same way, so that each test runs against both."""

    def collect(
        self, address: str, *args: Any, client: dict[str, Any] | None = None, **options: Any
    ) -> tuple[list[Token], Result]:
        with Client(address, **client or {}) as opened:
            stream = opened.stream(*args, **options)
            return list(stream), stream.result

    def call(self, address: str, name: str, *args: Any, **options: Any) -> Any:
        with Client(address) as opened:
            return getattr(opened, name)(*args, **options)

    def first_then(self, address: str, then: Callable[[Any, Any], Any], **options: Any) -> Any:
        """Reads one token of an endless answer, then does something with the client and the stream."""
        with Client(address) as opened:
            stream = opened.stream("forever", **options)
            assert next(stream).text == "x"
            return then(opened, stream)

    def rest(self, stream: Any) -> list[Token]:
        return list(stream)

    def close(self, client: Any) -> None:
        client.close()


class Awaited(Blocking):
    def collect(
        self, address: str, *args: Any, client: dict[str, Any] | None = None, **options: Any
    ) -> tuple[list[Token], Result]:
        async def run() -> tuple[list[Token], Result]:
            async with AsyncClient(address, **client or {}) as opened:
                stream = opened.stream(*args, **options)
                return [token async for token in stream], stream.result

        return asyncio.run(run())

    def call(self, address: str, name: str, *args: Any, **options: Any) -> Any:
        async def run() -> Any:
            async with AsyncClient(address) as opened:
                return await getattr(opened, name)(*args, **options)

        return asyncio.run(run())

    def first_then(self, address: str, then: Callable[[Any, Any], Any], **options: Any) -> Any:
        async def run() -> Any:
            async with AsyncClient(address) as opened:
                stream = opened.stream("forever", **options)
                assert (await anext(stream)).text == "x"
                outcome = then(opened, stream)
                return await outcome if isinstance(outcome, Awaitable) else outcome

        return asyncio.run(run())

    async def rest(self, stream: Any) -> list[Token]:  # type: ignore[override]
        return [token async for token in stream]

    async def close(self, client: Any) -> None:  # type: ignore[override]
        await client.close()
