"""OpenAI's own Python client against the HTTP front on a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from scripted_front import ScriptedFront, serving

WAIT_S = 20.0
TEXT = "Hello world😀!"


@pytest.fixture
def front() -> ScriptedFront:
    return ScriptedFront()


@pytest.fixture
async def client(front: ScriptedFront) -> AsyncIterator[openai.AsyncOpenAI]:
    plain = openai.DefaultAsyncHttpxClient(verify=False)  # no certificates to load
    async with (
        serving(front) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=plain) as made,
    ):
        yield made


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


async def test_a_whole_completion(client: openai.AsyncOpenAI, front: ScriptedFront) -> None:
    answer = await client.completions.create(model="demo", prompt="go", max_tokens=5, temperature=0, seed=-1, stop="END")
    assert (answer.object, answer.model, answer.id.startswith("cmpl-")) == ("text_completion", "demo", True)
    assert [(c.index, c.text, c.finish_reason, c.logprobs) for c in answer.choices] == [(0, TEXT, "length", None)]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (7, 5, 12)
    assert answer.usage.prompt_tokens_details.cached_tokens == 4
    sent = front.requests[0].sampling
    assert (sent.max_tokens, sent.temperature, sent.seed, sent.stop) == (5, 0.0, 2**64 - 1, ("END",))


async def test_a_streamed_completion(client: openai.AsyncOpenAI) -> None:
    stream = await client.completions.create(model="demo", prompt=[1, 2], stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].text for c in chunks if c.choices) == TEXT
    assert [c.choices[0].finish_reason for c in chunks if c.choices] == [None] * 4 + ["length"]
    assert [c.usage is None for c in chunks] == [True] * 5 + [False]
    assert chunks[-1].choices == []
    assert len({c.id for c in chunks}) == 1


async def test_a_whole_chat(client: openai.AsyncOpenAI, front: ScriptedFront) -> None:
    answer = await client.chat.completions.create(
        model="demo",
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "hi "}, {"type": "text", "text": "there"}]},
        ],
        max_completion_tokens=9,
    )
    assert (answer.object, answer.id.startswith("chatcmpl-")) == ("chat.completion", True)
    message = answer.choices[0].message
    assert (message.role, message.content, answer.choices[0].finish_reason) == ("assistant", TEXT, "length")
    prompt: Any = front.requests[0].prompt
    assert [(m.role, m.content) for m in prompt.messages] == [("system", "be brief"), ("user", "hi there")]
    assert front.requests[0].sampling.max_tokens == 9


async def test_a_streamed_chat(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model="demo", messages=user("hi"), stream=True)
    deltas = [chunk.choices[0].delta async for chunk in stream]
    assert [d.role for d in deltas] == ["assistant"] + [None] * 4
    assert [d.content for d in deltas] == ["Hello", " world", "😀", "!", None]


async def test_several_choices(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="demo", messages=user("hi"), n=3)
    assert [(c.index, c.message.content) for c in answer.choices] == [(i, TEXT) for i in range(3)]
    stream = await client.chat.completions.create(model="demo", messages=user("hi"), n=2, stream=True)
    texts = ["", ""]
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [TEXT, TEXT]


async def test_several_prompts_are_answered_in_order(client: openai.AsyncOpenAI, front: ScriptedFront) -> None:
    answer = await client.completions.create(model="demo", prompt=["a", "b"], n=2, echo=True)
    assert [(c.index, c.text) for c in answer.choices] == [(0, "a" + TEXT), (1, "a" + TEXT), (2, "b" + TEXT), (3, "b" + TEXT)]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (14, 20)
    assert len({r.request_id for r in front.requests}) == 2
    stream = await client.completions.create(model="demo", prompt=[[1], [2]], stream=True)
    texts = ["", ""]
    async for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [TEXT, TEXT]


async def test_logprobs_of_a_chat(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="demo", messages=user("hi"), logprobs=True, top_logprobs=2)
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    assert [(t.token, t.logprob, t.bytes) for t in content[1:3]] == [
        (" world", -0.25, list(b" world")),
        ("bytes:\\xf0\\x9f", -0.25, [0xF0, 0x9F]),
    ]
    assert [(t.token, t.logprob) for t in content[0].top_logprobs] == [("Hello", -0.25), ("!", -9999.0)]
    plain = await client.chat.completions.create(model="demo", messages=user("hi"), logprobs=True)
    assert plain.choices[0].logprobs is not None
    assert [t.top_logprobs for t in plain.choices[0].logprobs.content or ()] == [[]] * 5


async def test_logprobs_of_a_completion_streamed_and_whole(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="demo", prompt="go", logprobs=2)
    whole = answer.choices[0].logprobs
    assert whole is not None
    assert whole.tokens == ["Hello", " world", "bytes:\\xf0\\x9f", "bytes:\\x98\\x80", "!"]
    assert whole.token_logprobs == [-0.25] * 5
    assert whole.text_offset == [0, 5, 11, 11, 12]
    assert whole.top_logprobs is not None
    assert whole.top_logprobs[0] == {"Hello": -0.25, "!": -9999.0}
    stream = await client.completions.create(model="demo", prompt="go", logprobs=0, stream=True)
    pieces = [chunk.choices[0].logprobs async for chunk in stream]
    assert [o for p in pieces if p for o in p.text_offset or ()] == whole.text_offset
    assert all(p.top_logprobs is None for p in pieces if p)


async def test_our_extensions_travel_in_the_body(client: openai.AsyncOpenAI, front: ScriptedFront) -> None:
    extra = {
        "top_k": 4,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "stop_token_ids": [9],
        "ignore_eos": True,
        "slo_class": "chat",
        "ttft_slo_s": 0.5,
        "tbt_slo_s": 0.1,
        "priority": 2,
        "return_token_ids": True,
        "request_id": "mine",
    }
    answer = await client.completions.with_raw_response.create(
        model="demo", prompt="go", logit_bias={"7": -1}, user="u", extra_body=extra
    )
    assert answer.headers["x-request-id"] == "mine"
    assert answer.parse().choices[0].to_dict()["token_ids"] == [1, 2, 3, 4, 5]
    sent = front.requests[0]
    assert (sent.slo_class, sent.slo.ttft_s, sent.slo.tbt_s, sent.slo.tpot_s, sent.priority) == ("chat", 0.5, 0.1, None, 2)
    p = sent.sampling
    assert (p.top_k, p.min_p, p.repetition_penalty, p.stop_token_ids, p.ignore_eos) == (4, 0.1, 1.1, (9,), True)
    assert (dict(p.logit_bias), p.max_tokens) == ({7: -1.0}, 16)


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [m.id async for m in client.models.list()] == ["demo"]
    assert (await client.models.retrieve("demo")).owned_by == "tandem"
    with pytest.raises(openai.NotFoundError, match="no/such"):
        await client.models.retrieve("no/such")


async def test_an_unknown_model(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await client.completions.create(model="gpt-9", prompt="x")
    assert (caught.value.code, caught.value.param, caught.value.type) == ("model_not_found", "model", "invalid_request_error")


async def test_overload_says_when_to_come_back(client: openai.AsyncOpenAI) -> None:
    for stream in (False, True):
        with pytest.raises(openai.RateLimitError, match="too busy") as caught:
            await client.completions.create(model="demo", prompt="refuse", stream=stream)
        assert caught.value.response.headers["retry-after"] == "3"
        assert caught.value.request_id


async def test_no_workers_yet(client: openai.AsyncOpenAI, front: ScriptedFront) -> None:
    front.serving = False
    with pytest.raises(openai.InternalServerError) as caught:
        await client.chat.completions.create(model="demo", messages=user("x"))
    assert (caught.value.status_code, caught.value.code) == (503, "unavailable")


@pytest.mark.parametrize(("script", "says"), [("fail_late", "worker fault"), ("crash", "made a mistake")])
async def test_an_error_in_mid_stream_is_an_event(client: openai.AsyncOpenAI, script: str, says: str) -> None:
    stream = await client.completions.create(model="demo", prompt=script, stream=True)
    assert [(await anext(stream)).choices[0].text for _ in range(2)] == ["Hello", " world"]
    with pytest.raises(openai.APIError, match=says):
        await anext(stream)
    with pytest.raises(openai.InternalServerError, match=says) as caught:
        await client.completions.create(model="demo", prompt=script)
    assert "secret" not in str(caught.value.body)


@pytest.mark.parametrize("prompt", ["wait", ["wait", "wait"]])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_cancels(
    client: openai.AsyncOpenAI, front: ScriptedFront, prompt: Any, stream: bool
) -> None:
    async def ask() -> None:
        answer = await client.completions.create(model="demo", prompt=prompt, stream=stream)
        if stream:
            async for _ in answer:
                pass

    task = asyncio.create_task(ask(), name="ask")
    await asyncio.wait_for(front.asked.wait(), WAIT_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(front.closed.wait(), WAIT_S)


def test_the_blocking_client_works_too(front: ScriptedFront) -> None:
    async def run() -> str:
        async with serving(front) as url:
            return await asyncio.to_thread(ask, url)

    def ask(url: str) -> str:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
            stream = client.chat.completions.create(model="demo", messages=user("hi"), stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    assert asyncio.run(run()) == TEXT
