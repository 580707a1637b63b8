"""Both front doors of a real cluster: the same answers through gRPC and HTTP, stops, cancels, refusals, nothing left over."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import grpc
import openai
import pytest
from cluster_up import Cluster, eventually, tandem_up
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

import tandem
from tandem import Client, SamplingParams
from tandem.v1 import cluster_pb2, cluster_pb2_grpc, common_pb2

pytestmark = [pytest.mark.service, pytest.mark.timeout(180)]

PROMPT = "def read_lines(path):\n"
GREEDY = SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with tandem_up(tmp_path_factory.mktemp("doors")) as running:
        yield running


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> Iterator[Client]:
    with Client(cluster.grpc, timeout_s=60) as opened:
        yield opened


@pytest.fixture(scope="module")
def http(cluster: Cluster) -> Iterator[openai.OpenAI]:
    plain = openai.DefaultHttpxClient(verify=False)
    with openai.OpenAI(base_url=f"http://{cluster.http}/v1", api_key="none", max_retries=0, http_client=plain) as opened:
        yield opened


@pytest.fixture(autouse=True)
def nothing_is_left_over(cluster: Cluster) -> Iterator[None]:
    yield
    with grpc.insecure_channel(cluster.grpc) as channel:
        stub = cluster_pb2_grpc.ClusterStub(channel)  # type: ignore[no-untyped-call]

        def idle() -> bool:
            reports = stub.GetStatus(cluster_pb2.GetStatusRequest(), timeout=10).workers
            workers = [w for w in reports if w.role != common_pb2.WORKER_ROLE_ROUTER]
            assert all(w.running + w.waiting + w.leases_open + w.blocks.active == 0 for w in workers), workers
            return len(workers) == 3  # prefill, decode, store

        eventually(idle)


def test_an_answer_of_one_token_says_what_its_prompt_took(client: Client) -> None:
    """Its first token is its last: what the worker says of the prompt must not come after it."""
    result = client.generate("an answer of one token " * 8, SamplingParams(max_tokens=1, temperature=0.0))
    assert result.usage.completion_tokens == 1
    assert result.timing.ttft_s > result.timing.prefill_s > 0


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_both_doors_give_the_same_answer(client: Client, http: openai.OpenAI, temperature: float) -> None:
    params = SamplingParams(max_tokens=24, temperature=temperature, seed=11, n=2, logprobs=2)
    with client.stream(PROMPT, params, echo=True) as stream:
        tokens = list(stream)
    result = stream.result
    answer = http.completions.create(
        model="demo",
        prompt=PROMPT,
        max_tokens=24,
        temperature=temperature,
        seed=11,
        n=2,
        logprobs=2,
        extra_body={"return_token_ids": True},
    )
    assert [tuple(c.to_dict()["token_ids"]) for c in answer.choices] == [c.token_ids for c in result.choices]  # type: ignore[arg-type]
    assert [c.text for c in answer.choices] == [c.text for c in result.choices]
    assert ["".join(t.text for t in tokens if t.choice == i) for i in range(2)] == [c.text for c in result.choices]
    assert [c.logprobs.token_logprobs for c in answer.choices if c.logprobs] == [list(c.logprobs) for c in result.choices]
    assert (result.choices[0].token_ids == result.choices[1].token_ids) == (temperature == 0.0)
    assert result.prompt_text == PROMPT
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (
        result.usage.prompt_tokens,
        result.usage.completion_tokens,
    )
    assert (result.placement.prefill, result.placement.decode) == ("prefill-0", "decode-0")
    assert result.timing.ttft_s > result.timing.prefill_s > 0


def test_a_chat_streams_the_same_through_both_doors(client: Client, http: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "write a loop"}]
    result = client.generate(messages, GREEDY)
    stream = http.chat.completions.create(
        model="demo", messages=messages, max_tokens=32, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == result.text
    assert result.text


def test_a_stop_string_across_tokens_ends_the_text_before_it(client: Client, http: openai.OpenAI) -> None:
    with client.stream(PROMPT, GREEDY) as stream:
        tokens = list(stream)
    whole = stream.result.text
    border = len("".join(t.text for t in tokens[:16]))
    stop = next(whole[i : i + 3] for i in range(border - 1, len(whole)) if whole.find(whole[i : i + 3]) == i)
    expected = whole[: whole.index(stop)]
    with client.stream(
        PROMPT, SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True, stop=(stop, "never"))
    ) as stopped:
        assert "".join(t.text for t in stopped) == expected
    assert (stopped.result.text, stopped.result.finish_reason) == (expected, "stop")
    pieces = http.completions.create(
        model="demo", prompt=PROMPT, max_tokens=32, temperature=0, stop=stop, stream=True, extra_body={"ignore_eos": True}
    )
    chunks = [chunk.choices[0] for chunk in pieces]
    assert ("".join(c.text for c in chunks), chunks[-1].finish_reason) == (expected, "stop")


def test_tokens_alone_make_the_whole_text_when_a_stop_string_was_begun(client: Client) -> None:
    whole = client.generate(PROMPT, GREEDY).text
    params = SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True, stop=(whole[-6:] + "and more",))
    with client.stream(PROMPT, params) as stream:
        tokens = list(stream)
    assert "".join(t.text for t in tokens) == whole == stream.result.text
    assert tuple(t.token_id for t in tokens) == stream.result.token_ids


def test_a_request_is_cancelled_by_its_id(client: Client) -> None:
    endless = SamplingParams(max_tokens=1500, temperature=0.0, ignore_eos=True)
    with client.stream(PROMPT, endless, request_id="to-cancel") as stream:
        next(stream)
        assert client.cancel("to-cancel")
        rest = list(stream)
    assert (stream.result.finish_reason, stream.result.request_id) == ("cancelled", "to-cancel")
    assert len(rest) < 1400
    assert not client.cancel("to-cancel")


def test_clients_that_leave_free_everything(client: Client, http: openai.OpenAI) -> None:
    """The fixture above finds nothing left."""
    endless = SamplingParams(max_tokens=1500, temperature=0.0, ignore_eos=True, n=2)
    with client.stream(PROMPT, endless) as stream:
        next(stream)
    chunks = http.completions.create(model="demo", prompt=PROMPT, max_tokens=1500, stream=True, extra_body={"ignore_eos": True})
    next(chunks)
    chunks.close()
    gone = threading.Event()

    def ask_and_leave() -> None:
        with pytest.raises(openai.APITimeoutError):
            http.with_options(timeout=0.3).completions.create(
                model="demo", prompt=PROMPT, max_tokens=1500, extra_body={"ignore_eos": True}
            )
        gone.set()

    threading.Thread(target=ask_and_leave, name="impatient").start()
    assert gone.wait(30)
    with pytest.raises(tandem.DeadlineExceededError):
        client.generate(PROMPT, endless, timeout_s=0.3)


@pytest.mark.parametrize(
    ("prompt", "params", "kind", "code"),
    [
        ("x = 1\n" * 5000, SamplingParams(max_tokens=4), tandem.PromptTooLongError, "context_length_exceeded"),
        (PROMPT, SamplingParams(max_tokens=100_000), tandem.InvalidRequestError, "context_length_exceeded"),
        ([1, 2, 99_999], SamplingParams(max_tokens=4), tandem.InvalidRequestError, "invalid_request"),
    ],
)
def test_what_cannot_be_served_is_refused_alike(
    client: Client, http: openai.OpenAI, prompt: Any, params: SamplingParams, kind: type[tandem.TandemError], code: str
) -> None:
    with pytest.raises(kind) as refused:
        client.generate(prompt, params)
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            http.completions.create(model="demo", prompt=prompt, max_tokens=params.max_tokens, stream=stream)
        assert (caught.value.code, caught.value.body["message"]) == (code, refused.value.message)  # type: ignore[index]


def test_reflection_lists_the_services(cluster: Cluster) -> None:
    with grpc.insecure_channel(cluster.grpc) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert {"tandem.v1.Inference", "grpc.health.v1.Health"} <= set(database.get_services())
        found = database.FindFileContainingSymbol("tandem.v1.Inference")
        assert [m.name for m in found.service[0].method] == ["Generate", "Cancel", "GetModel", "Explain"]
