"""Both clients of the SDK against a real gRPC server whose answers are scripted by the prompt."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from scripted_inference import WAIT_S, Awaited, Blocking, ScriptedInference, serving

import tandem
from tandem import AsyncClient, Client, SamplingParams


@pytest.fixture
def servicer() -> ScriptedInference:
    return ScriptedInference()


@pytest.fixture
def address(servicer: ScriptedInference) -> Iterator[str]:
    with serving(servicer) as found:
        yield found


@pytest.fixture(params=[Blocking, Awaited], ids=["client", "aio"])
def driver(request: pytest.FixtureRequest) -> Blocking:
    made: Blocking = request.param()
    return made


def test_a_stream_gives_tokens_and_then_its_result(address: str, driver: Blocking) -> None:
    got, result = driver.collect(address, "hello", SamplingParams(max_tokens=2), echo=True)
    assert [(t.text, t.token_id, t.position, t.logprob, t.choice) for t in got] == [
        ("he", 100, 0, -0.5, 0),
        ("llo", 101, 1, -0.5, 0),
    ]
    assert got[0].top_logprobs == ((7, -1.5),)
    assert (result.text, result.token_ids, result.finish_reason) == ("hello", (100, 101), "stop")
    assert (result.request_id, result.failovers, result.seed, result.prompt_text) == ("made-by-router", 1, 11, "ask")
    assert (result.usage.prompt_tokens, result.usage.cached_tokens, result.usage.completion_tokens) == (3, 1, 2)
    assert (result.timing.queue_s, result.timing.ttft_s, result.placement.prefill, result.placement.decode) == (
        0.25,
        0.5,
        "p-0",
        "d-0",
    )
    assert result.choices[0].logprobs == (-0.5, -0.5)


def test_every_choice_has_its_own_text(address: str, driver: Blocking) -> None:
    got, result = driver.collect(address, "two", SamplingParams(n=2))
    assert [(t.choice, t.text) for t in got] == [(1, "a"), (0, "b"), (0, "c"), (1, "!")]
    assert [(c.text, c.finish_reason, len(c.token_ids)) for c in result.choices] == [("bc", "stop", 2), ("a!", "length", 1)]


def test_generate_cancel_and_model(address: str, driver: Blocking) -> None:
    assert driver.call(address, "generate", "hello", timeout_s=WAIT_S).text == "hello"
    assert driver.call(address, "cancel", "known") is True
    assert driver.call(address, "cancel", "unknown") is False
    assert driver.call(address, "model").max_model_len == 512


def test_everything_asked_for_reaches_the_server(address: str, driver: Blocking, servicer: ScriptedInference) -> None:
    params = SamplingParams(max_tokens=5, temperature=0.0, seed=2**63, stop="END of a long one", logit_bias={3: -1.0})  # type: ignore[arg-type]
    options = {
        "request_id": "mine",
        "slo_class": "chat",
        "ttft_slo_s": 0.5,
        "tbt_slo_s": 0.1,
        "tpot_slo_s": 0.2,
        "priority": -3,
    }
    driver.collect(address, [1, 2, 3], params, client={"api_key": "k"}, **options)
    sent = servicer.requests[0]
    assert list(sent.token_ids.ids) == [1, 2, 3]
    assert {name: getattr(sent, name) for name in options} == options
    assert (sent.sampling.temperature, sent.sampling.HasField("temperature")) == (0.0, True)
    assert (sent.sampling.seed, list(sent.sampling.stop), dict(sent.sampling.logit_bias)) == (
        2**63,
        ["END of a long one"],
        {3: -1.0},
    )
    assert servicer.metadata[0]["authorization"] == "Bearer k"


def test_a_chat_is_sent_as_messages(address: str, driver: Blocking, servicer: ScriptedInference) -> None:
    driver.collect(address, [{"role": "user", "content": "hi"}])
    assert [(m.role, m.content) for m in servicer.requests[0].chat.messages] == [("user", "hi")]


def test_unavailable_before_the_answer_is_tried_again(address: str, driver: Blocking, servicer: ScriptedInference) -> None:
    servicer.refusals = 2
    assert driver.collect(address, "flaky")[1].text == "hello"
    assert len(servicer.requests) == 3


def test_retries_are_bounded(address: str, driver: Blocking, servicer: ScriptedInference) -> None:
    servicer.refusals = 100
    with pytest.raises(tandem.UnavailableError, match=f"{address}.*not yet"):
        driver.collect(address, "flaky", client={"max_retries": 1})
    assert len(servicer.requests) == 2


def test_an_answer_that_began_is_never_asked_for_again(address: str, driver: Blocking, servicer: ScriptedInference) -> None:
    with pytest.raises(tandem.UnavailableError, match="worker gone"):
        driver.collect(address, "broken")
    assert len(servicer.requests) == 1


def test_a_router_that_is_not_there_is_named(driver: Blocking) -> None:
    with pytest.raises(tandem.UnavailableError, match=r"127\.0\.0\.1:1 .*check the address"):
        driver.collect("127.0.0.1:1", "hello", client={"max_retries": 1})


@pytest.mark.parametrize(
    ("script", "kind", "retry_after_s"),
    [
        ("INVALID_ARGUMENT,invalid_request,", tandem.InvalidRequestError, None),
        ("INVALID_ARGUMENT,context_length_exceeded,", tandem.PromptTooLongError, None),
        ("UNAUTHENTICATED,,", tandem.AuthenticationError, None),
        ("PERMISSION_DENIED,permission_denied,", tandem.PermissionDeniedError, None),
        ("NOT_FOUND,,", tandem.NotFoundError, None),
        ("RESOURCE_EXHAUSTED,request_too_large,", tandem.RequestTooLargeError, None),
        ("RESOURCE_EXHAUSTED,overloaded,2.5", tandem.OverloadedError, 2.5),
        ("RESOURCE_EXHAUSTED,out_of_blocks,later", tandem.OverloadedError, None),
        ("CANCELLED,cancelled,", tandem.CancelledError, None),
        ("DEADLINE_EXCEEDED,,", tandem.DeadlineExceededError, None),
        ("INTERNAL,internal,", tandem.InternalError, None),
        ("UNKNOWN,,", tandem.InternalError, None),
    ],
)
def test_errors_arrive_as_what_they_were(
    address: str, driver: Blocking, script: str, kind: type[tandem.TandemError], retry_after_s: float | None
) -> None:
    with pytest.raises(tandem.TandemError, match="said by the server") as caught:
        driver.collect(address, "error", slo_class=script)
    assert (type(caught.value), caught.value.retry_after_s) == (kind, retry_after_s)


def test_a_stream_without_its_result_is_an_error(address: str, driver: Blocking) -> None:
    with pytest.raises(tandem.InternalError, match="without its result"):
        driver.collect(address, "truncated")


def test_a_deadline_ends_the_stream_here_and_there(address: str, driver: Blocking, servicer: ScriptedInference) -> None:
    with pytest.raises(tandem.DeadlineExceededError, match="timeout_s"):
        driver.first_then(address, lambda _, stream: driver.rest(stream), timeout_s=0.5)
    assert servicer.cancelled.wait(WAIT_S)


# ---- cancelling ----------------------------------------------------------------------------------------------------


def test_cancelling_a_stream_ends_it_quietly_with_what_came(
    address: str, driver: Blocking, servicer: ScriptedInference
) -> None:
    def cancel(_: Any, stream: Any) -> Any:
        stream.cancel()
        stream.cancel()
        return driver.rest(stream), stream

    if isinstance(driver, Awaited):

        async def finish(_: Any, stream: Any) -> Any:
            rest, _ = cancel(_, stream)
            return await rest, stream

        rest, stream = driver.first_then(address, finish)
    else:
        rest, stream = driver.first_then(address, cancel)
    assert rest == []
    assert (stream.result.text, stream.result.finish_reason, stream.result.usage.completion_tokens) == ("x", "cancelled", 1)
    assert servicer.cancelled.wait(WAIT_S)


def test_closing_the_client_ends_its_streams_at_the_server(address: str, driver: Blocking, servicer: ScriptedInference) -> None:
    driver.first_then(address, lambda client, _: driver.close(client))
    assert servicer.cancelled.wait(WAIT_S)


def test_leaving_the_block_cancels(address: str, servicer: ScriptedInference) -> None:
    with Client(address) as client:
        with client.stream("forever") as stream:
            next(stream)
        assert servicer.cancelled.wait(WAIT_S)


async def test_leaving_the_async_block_cancels(address: str, servicer: ScriptedInference) -> None:
    async with AsyncClient(address) as client:
        async with client.stream("forever") as stream:
            await anext(stream)
        assert await asyncio.to_thread(servicer.cancelled.wait, WAIT_S)


def test_dropping_a_stream_cancels(address: str, servicer: ScriptedInference) -> None:
    with Client(address) as client:
        stream = client.stream("forever")
        next(stream)
        del stream
        gc.collect()
        assert servicer.cancelled.wait(WAIT_S)


async def test_dropping_an_async_stream_cancels(address: str, servicer: ScriptedInference) -> None:
    async with AsyncClient(address) as client:
        stream = client.stream("forever")
        await anext(stream)
        del stream
        gc.collect()
        assert await asyncio.to_thread(servicer.cancelled.wait, WAIT_S)


async def test_cancelling_the_task_that_reads_cancels_the_request(address: str, servicer: ScriptedInference) -> None:
    async with AsyncClient(address) as client:
        reading = asyncio.Event()

        async def read() -> None:
            async for _ in client.stream("forever"):
                reading.set()

        task = asyncio.create_task(read(), name="reader")
        await asyncio.wait_for(reading.wait(), WAIT_S)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(servicer.cancelled.wait, WAIT_S)


def test_an_interrupt_while_waiting_cancels_the_request(address: str, servicer: ScriptedInference) -> None:
    """Ctrl-C raises in the main thread, inside the wait for the next token."""
    import signal

    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it runs behind
    try:
        with Client(address) as client:
            stream = client.stream("forever")
            next(stream)
            timer = threading.Timer(0.2, signal.raise_signal, (signal.SIGINT,))
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                next(stream)
            timer.join(WAIT_S)
            assert servicer.cancelled.wait(WAIT_S)
    finally:
        signal.signal(signal.SIGINT, inherited)


def test_a_stream_may_be_cancelled_from_another_thread(address: str, servicer: ScriptedInference) -> None:
    with Client(address) as client:
        stream = client.stream("forever")
        next(stream)
        timer = threading.Timer(0.1, stream.cancel)
        timer.start()
        assert list(stream) == []
        timer.join(WAIT_S)
        assert stream.result.finish_reason == "cancelled"


def test_a_closed_client_says_so(address: str) -> None:
    client = Client(address)
    client.close()
    client.close()
    with pytest.raises(tandem.CancelledError, match="closed"):
        client.stream("hello")
    with pytest.raises(tandem.CancelledError, match="closed"):
        client.model()


# ---- what never reaches the server ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "params", "options", "says"),
    [
        ("", SamplingParams(), {}, "prompt is empty"),
        ([], SamplingParams(), {}, "prompt is empty"),
        ("x", SamplingParams(temperature=-1), {}, "temperature must be"),
        ("x", SamplingParams(n=0, max_tokens=0), {}, "max_tokens must be.*n must be"),
        ([-1], SamplingParams(), {}, "cannot be encoded"),
        ([2**32], SamplingParams(), {}, "cannot be encoded"),
        ([1.5], SamplingParams(), {}, "cannot be encoded"),
        (b"text", SamplingParams(), {}, "decode bytes into text"),
        ("\ud83d", SamplingParams(), {}, "cannot be encoded"),
        ([{"role": "user"}], SamplingParams(), {}, "exactly `role` and `content`"),
        ("x", SamplingParams(), {"max_tokens": 3}, "unknown options.*max_tokens"),
    ],
)
def test_values_that_cannot_be_served_are_refused_at_once(prompt: Any, params: Any, options: Any, says: str) -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(tandem.InvalidRequestError, match=says):
        client.stream(prompt, params, **options)


@pytest.mark.parametrize("address", ["", "http://127.0.0.1:80"])
def test_an_address_is_host_and_port(address: str) -> None:
    with pytest.raises(tandem.InvalidRequestError, match="HOST:PORT"):
        Client(address)


def test_the_result_is_not_there_before_the_end(address: str) -> None:
    with Client(address) as client, client.stream("forever") as stream:
        next(stream)
        with pytest.raises(tandem.TandemError, match="has not ended"):
            stream.result  # noqa: B018
        assert stream.request_id == "made-by-router"


def test_the_sampling_parameters_load_without_grpc() -> None:
    program = "import sys, tandem.sampling, tandem.errors; assert 'grpc' not in sys.modules; from tandem import *; Client"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
