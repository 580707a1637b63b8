"""Events cut from a frame are those that the reply itself would make."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.request import FinishReason
from router.frontend_types import ChoiceFinished, ModelCard, Part, Started, Token, TokenBatch
from router.openai_replies import Reply
from router.openai_types import read_chat, read_completion
from router.sse import DONE, EventStream, event

CARD = ModelCard("m", "1", max_model_len=100, vocab_size=50, fingerprint="f" * 16, dtype="float32")
FIELDS = {"plain": {}, "ids": {"return_token_ids": True}, "usage": {"stream_options": {"include_usage": True}}}


def reply(chat: bool, request_id: str = "r", **fields: object) -> Reply:
    body = {"model": 'm"\\\0', "stream": True, **fields}
    prompt = {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": ["x", "y"]}
    call = (read_chat if chat else read_completion)(json.dumps(body | prompt).encode())
    return Reply(call, CARD, request_id, 1, lambda token_id: b"t%d" % token_id)


def chunks(told: Reply, parts: list[tuple[int, Part]]) -> list[bytes]:
    return [b"".join(map(event, told.chunks(prompt, part))) for prompt, part in parts]


batches = st.lists(st.tuples(st.integers(0, 1), st.text(max_size=4)), min_size=1, max_size=4)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("name", [*FIELDS, "logprobs"])
@given(seen=st.lists(batches, max_size=8), prompts=st.data())
def test_the_events_are_the_reply_s_chunks(chat: bool, name: str, seen: list[list[tuple[int, str]]], prompts: st.DataObject):
    fields = FIELDS.get(name) or ({"logprobs": True} if chat else {"logprobs": 1}) if name != "plain" else {}
    parts: list[tuple[int, Part]] = [(0, Started("r", 1, 1, ""))]
    for batch in seen:
        tokens = tuple(Token(choice, 0, 7 + choice, text, -0.5) for choice, text in batch)
        parts.append((0 if chat else prompts.draw(st.integers(0, 1)), TokenBatch(tokens)))
    parts.append((0, ChoiceFinished(0, FinishReason.STOP, "tail")))
    stream, twin = EventStream(reply(chat, n=2, **fields)), reply(chat, n=2, **fields)
    assert [stream.events(prompt, part) for prompt, part in parts] == chunks(twin, parts)
    assert stream.closing() == b"".join(map(event, twin.closing_chunks())) + DONE


def test_most_events_are_cut_from_the_frame(monkeypatch: pytest.MonkeyPatch):
    told = reply(chat=False)
    stream = EventStream(told)
    parts = [(0, TokenBatch((Token(0, position, 7, 'é"\n'),))) for position in range(5)]
    expected = chunks(reply(chat=False), parts)
    assert stream.events(*parts[0]) == expected[0]
    monkeypatch.setattr(Reply, "chunks", lambda *_: pytest.fail("made anew"))
    assert [stream.events(*part) for part in parts[1:]] == expected[1:]
