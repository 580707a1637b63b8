"""What a user gets from the router, over real sessions: text, stops, choices, queueing, cancels, refusals."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from dataclasses import replace

import pytest
from router_rig import PROMPT, request, rig, tokenizer
from scripted_worker import expected

from core.errors import (
    InvalidRequestError,
    PromptTooLongError,
    TandemError,
)
from core.request import FinishReason
from core.text import Tokenizer
from router.frontend_types import ChatMessage, ChatPrompt, FrontRequest, Started
from tandem.sampling import SamplingParams


async def test_the_parts_of_a_stream():
    async with rig() as r:
        result = await r.generate(request())
        assert result.started == Started(result.started.request_id, 20, 7, "")  # type: ignore[union-attr]
        assert result.parts[0] is result.started
        assert result.parts[-1] is result.finished
        assert result.ids() == expected(PROMPT, 7, 16)
        assert result.text() == tokenizer().decode(result.ids())
        assert result.finished is not None
        assert (result.finished.usage.prompt_tokens, result.finished.usage.completion_tokens) == (20, 16)
        assert (result.finished.placement.prefill, result.finished.placement.decode) == ("prefill-0", "decode-0")
        timing = result.finished.timing
        assert 0 < timing.queue_s < timing.ttft_s < timing.total_s
        assert (timing.prefill_s, timing.transfer_s) == (0.002, 0.001)
        assert timing.tpot_s > 0
        await r.all_free()


async def test_one_token_needs_no_decode():
    async with rig() as r:
        result = await r.generate(request(max_tokens=1))
        assert result.ids() == expected(PROMPT, 7, 1)
        assert result.reason() is FinishReason.LENGTH
        await r.all_free()


async def test_text_prompts_echo_and_chat():
    async with rig() as r:
        text = await r.generate(replace(request(), prompt="def main():", echo=True))
        assert text.started is not None
        assert text.started.prompt_text == "def main():"
        ids = tuple(tokenizer().encode("def main():"))
        assert text.ids() == expected(ids, 7, 16)
        chat = ChatPrompt((ChatMessage("user", "hello"),))
        said = await r.generate(replace(request(), prompt=chat))
        assert said.ids() == expected(tuple(tokenizer().chat([{"role": "user", "content": "hello"}])), 7, 16)


async def test_without_a_seed_one_is_drawn_and_told():
    async with rig() as r:
        params = SamplingParams(max_tokens=5, ignore_eos=True)
        first, second = [await r.generate(FrontRequest(PROMPT, params)) for _ in range(2)]
        assert first.started is not None
        assert second.started is not None
        assert first.started.seed != second.started.seed
        assert first.ids() == expected(PROMPT, first.started.seed, 5)


async def test_a_stop_string_ends_the_choice_on_the_worker_too():
    async with rig(step_s=0.001) as r:
        whole = tokenizer().decode(expected(PROMPT, 7, 500))
        stop = whole[20:24]
        result = await r.generate(request(max_tokens=500, stop=(stop, "never")))
        assert result.text() == whole[: whole.index(stop)]
        assert result.reason() is FinishReason.STOP
        assert result.finished is not None
        assert result.finished.usage.completion_tokens < 500
        await r.all_free()
        assert ("cancel") in {kind for kind, _ in r.workers["decode-0"].seen}


async def test_a_stop_id_has_no_text():
    async with rig() as r:
        ids = expected(PROMPT, 7, 16)
        position = next(i for i in range(1, 16) if ids[i] not in ids[:i])
        result = await r.generate(request(stop_token_ids=(ids[position],)))
        assert result.ids() == ids[: position + 1]
        assert result.text() == tokenizer().decode(ids[:position])
        assert result.reason() is FinishReason.STOP
        await r.all_free()


async def test_choices_follow_the_first_one():
    async with rig(prefill=2, decode=2) as r:
        result = await r.generate(request(n=4))
        for choice in range(4):
            assert result.ids(choice) == expected(PROMPT, 7, 16, choice)
            assert result.reason(choice) is FinishReason.LENGTH
        busy = {name for name, worker in r.workers.items() if worker.seen}
        assert len(busy) == 2, "all on the pair that has the prompt cached"
        starts = [key.request_id for kind, key in r.workers["prefill-0"].seen if kind == "start_prefill"]
        assert result.started is not None
        root = result.started.request_id
        assert starts == [root, f"{root}/1", f"{root}/2", f"{root}/3"]
        assert result.finished is not None
        assert result.finished.usage.completion_tokens == 64
        await r.all_free()


async def test_logprobs_pass_through():
    async with rig(0, 0, colocated=1) as r:
        result = await r.generate(request(logprobs=1))
        assert all(t.logprob == -0.5 and t.top_logprobs == ((t.token_id, -0.5),) for t in result.tokens)


BAD = [
    (FrontRequest(()), InvalidRequestError, "empty"),
    (FrontRequest(""), InvalidRequestError, "empty"),
    (FrontRequest(ChatPrompt(())), InvalidRequestError, "message"),
    (FrontRequest((1, 256)), InvalidRequestError, "256"),
    (FrontRequest((1, -1)), InvalidRequestError, "-1"),
    (FrontRequest("\ud800"), InvalidRequestError, "surrogate"),
    (FrontRequest((1,) * 4096), PromptTooLongError, "shorten"),
    (FrontRequest("x" * 2**20), PromptTooLongError, "fit"),
    (FrontRequest((1,) * 4000, SamplingParams(max_tokens=97)), PromptTooLongError, "lower max_tokens to 96"),
    (FrontRequest((1,), SamplingParams(max_tokens=0)), InvalidRequestError, "max_tokens"),
    (FrontRequest((1,), SamplingParams(temperature=-1, top_p=0)), InvalidRequestError, "top_p"),
    (FrontRequest((1,), SamplingParams(logit_bias={999: 1.0})), InvalidRequestError, "999"),
    (FrontRequest((1,), request_id="a/b"), InvalidRequestError, "request_id"),
    (FrontRequest((1,), request_id="x" * 200), InvalidRequestError, "request_id"),
]


@pytest.mark.parametrize(("bad", "kind", "names"), BAD, ids=lambda v: str(v)[:40])
async def test_bad_requests_are_told_what_to_change(bad: FrontRequest, kind: type[TandemError], names: str):
    async with rig() as r:
        with pytest.raises(kind) as caught:
            await r.generate(bad)
        assert names in caught.value.message
        assert not r.workers["prefill-0"].seen
        await r.all_free()


async def test_what_fills_the_context_is_served():
    async with rig(0, 0, colocated=1) as r:
        prompt = tuple(40 + i % 50 for i in range(4090))
        result = await r.generate(FrontRequest(prompt, SamplingParams(seed=1, ignore_eos=True)))
        assert result.ids() == expected(prompt, 1, 6)


async def test_a_live_request_id_is_unique_and_may_be_used_again_later():
    async with rig(step_s=0.001) as r:
        running = r.front.generate(request(max_tokens=500, request_id="mine"))
        await anext(running)
        with pytest.raises(InvalidRequestError, match="already running"):
            await r.generate(request(request_id="mine"))
        await running.aclose()
        await r.all_free()
        again = await r.generate(request(request_id="mine"))
        assert again.ids() == expected(PROMPT, 7, 16)
        attempts = [key.attempt for kind, key in r.workers["prefill-0"].seen if kind == "start_prefill"]
        assert attempts == [1, 2], "workers still refuse the attempts of its first life"


async def test_cancel_by_id_ends_the_stream():
    async with rig(step_s=0.001) as r:
        parts = []
        async for part in r.front.generate(request(max_tokens=2000, request_id="c", n=2)):
            parts.append(part)
            if len(parts) == 5:
                assert r.front.cancel("c")
        reasons = [p.finish_reason for p in parts if hasattr(p, "finish_reason")]
        assert reasons == [FinishReason.CANCELLED] * 2
        assert not r.front.cancel("c")
        await r.all_free()


async def test_cancel_reaches_a_request_whose_prompt_is_still_being_tokenized(monkeypatch: pytest.MonkeyPatch):
    async with rig() as r:
        tokenize, encode = threading.Event(), Tokenizer.encode

        def slow(self: Tokenizer, text: str, *, add_special_tokens: bool = True) -> list[int]:
            assert tokenize.wait(10)
            return encode(self, text[:100], add_special_tokens=add_special_tokens)

        monkeypatch.setattr(Tokenizer, "encode", slow)
        stream = asyncio.create_task(r.generate(replace(request(request_id="long"), prompt="x = 1\n" * 1000)))
        await r.until(lambda: r.front.live == 1)
        assert r.front.cancel("long")
        tokenize.set()
        assert (await stream).reason() is FinishReason.CANCELLED
        await r.all_free()


async def test_random_cancels_and_disconnects_leave_nothing_held():
    rng = random.Random(5)
    async with rig(prefill=2, decode=2, colocated=1, step_s=0.0005) as r:

        async def one(index: int) -> None:
            stream = r.front.generate(request(max_tokens=rng.randrange(1, 40), seed=index, n=rng.choice((1, 1, 3))))
            stay = rng.choice((0, 1, 2, 5, 1000))
            with contextlib.suppress(asyncio.CancelledError):
                async for _ in stream:
                    if stay == 0:
                        break
                    stay -= 1
            await stream.aclose()

        async def disturbed(index: int) -> None:
            task = asyncio.create_task(one(index))
            if index % 3 == 0:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(asyncio.shield(task), rng.random() * 0.02)
                task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        for _ in range(4):
            await asyncio.gather(*(disturbed(i) for i in range(50)))
        await r.all_free()
