"""OpenAI's bodies: what is refused names its field, what is accepted becomes what the router understands."""

from __future__ import annotations

import json
from typing import Any

import pytest

from router.openai_fields import FieldError
from router.openai_types import ApiCall, read_chat, read_completion

OK = {"model": "demo", "prompt": "go"}
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "hi"}]}


def completion(change: dict[str, Any]) -> ApiCall:
    return read_completion(json.dumps(OK | change).replace("Infinity", "1e999").encode())


def chat(change: dict[str, Any]) -> ApiCall:
    return read_chat(json.dumps(CHAT | change).encode())


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"prompt": 3}, "prompt", "text, a list of texts"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": ["a", 1]}, "prompt", "token ids"),
        ({"prompt": [[]] * 200}, "prompt", "at most 128"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": "5"}, "max_tokens", "valid integer"),
        ({"max_tokens": True}, "max_tokens", "valid integer"),
        ({"temperature": -1}, "temperature", "between"),
        ({"temperature": 1e999}, "temperature", "between"),
        ({"top_p": 0}, "top_p", "top_p must be"),
        ({"n": 1000}, "n", "n must be"),
        ({"logprobs": 21}, "logprobs", "between 0 and 20"),
        ({"best_of": 2}, "best_of", "must equal n"),
        ({"suffix": "x"}, "suffix", "not supported"),
        ({"echo": True, "logprobs": 1}, "echo", "not supported"),
        ({"stop": [1]}, "stop", "list of strings"),
        ({"stop": [""]}, "stop", "1 to 1024"),
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"seed": 2**64}, "seed", "64 bits"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "no token id"),
        ({"logit_bias": {"1": 1000}}, "logit_bias", "between -100 and 100"),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
        ({"priority": 2**40}, "priority", "32 bits"),
        ({"request_id": "a\r\nb: c"}, "request_id", "letters"),
        ({"request_id": "a", "prompt": ["a", "b"]}, "request_id", "one request"),
        ({"temprature": 1}, "temprature", "unrecognized"),
        ({"model": None}, "model", "valid string"),
    ],
)
def test_a_bad_completion_names_its_field(change: Any, param: str | None, says: str) -> None:
    with pytest.raises(FieldError) as caught:
        completion(change)
    assert caught.value.param == param
    assert says in caught.value.message


IMAGE = [{"type": "image_url", "image_url": {"url": "data:"}}]


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"messages": []}, "messages", "at least one"),
        ({"messages": "hi"}, "messages", "valid list"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "'system'"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "must be text"),
        ({"messages": [{"role": "user", "content": IMAGE}]}, "messages.0.content.0", "no images"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "messages.0.tool_calls", "not supported"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"tool_choice": "required"}, "tool_choice", "not supported"),
        ({"functions": [{}]}, "functions", "not supported"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format", "only response_format"),
        ({"modalities": ["audio"]}, "modalities", "only the modality"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs=true"),
        ({"logprobs": 3}, "logprobs", "boolean"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "differ"),
        ({"prompt": "x"}, "prompt", "unrecognized"),
    ],
)
def test_a_bad_chat_names_its_field(change: Any, param: str, says: str) -> None:
    with pytest.raises(FieldError) as caught:
        chat(change)
    assert caught.value.param == param
    assert says in caught.value.message


@pytest.mark.parametrize(
    "change",
    [{"tools": []}, {"tool_choice": "none"}, {"response_format": {"type": "text"}}, {"store": False}, {"metadata": {"a": "b"}}],
)
def test_what_changes_nothing_is_accepted(change: Any) -> None:
    assert chat(change) == chat({})


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"model": "demo", "prompt": "\xff\xfe"}',
        b'{"model": "demo", "prompt": "\\ud83d"}',
        b'{"model": "demo", "prompt": "x", "temperature": NaN}',
        b"[" * 10_000 + b"]" * 10_000,
        b'["model"]',
        b'{"model": "demo", "prompt": [' + b"9" * 5000 + b"]}",
    ],
)
def test_a_body_that_is_no_json_object(body: bytes) -> None:
    with pytest.raises(FieldError, match="JSON"):
        read_completion(body)


@pytest.mark.parametrize("field", ["prompt", "model"])
def test_what_must_be_there(field: str) -> None:
    body = {key: value for key, value in OK.items() if key != field}
    with pytest.raises(FieldError, match=f"must provide {field}"):
        read_completion(json.dumps(body).encode())


def test_prompts_of_every_form() -> None:
    assert [r.prompt for r in completion({"prompt": [1, 2]}).requests] == [(1, 2)]
    assert [r.prompt for r in completion({"prompt": [[1], [2, 3]]}).requests] == [(1,), (2, 3)]
    assert [r.prompt for r in completion({"prompt": ["a", "b"]}).requests] == ["a", "b"]
    assert [r.prompt for r in completion({"prompt": ""}).requests] == [""]  # the router refuses it, with the model's word


def test_defaults_are_openais() -> None:
    sampling = completion({}).requests[0].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.n, sampling.logprobs) == (16, 1.0, 1, None)
    assert chat({}).requests[0].sampling.max_tokens is None


def test_logprobs_of_both_apis() -> None:
    assert chat({"logprobs": True}).requests[0].sampling.logprobs == 0
    assert chat({"logprobs": True, "top_logprobs": 5}).requests[0].sampling.logprobs == 5
    assert chat({"logprobs": False}).requests[0].sampling.logprobs is None
    assert completion({"logprobs": 0}).logprobs
