"""What is refused at the door, before any worker or any long computation sees it."""

import math

import pytest

from core.errors import InvalidRequestError, PromptTooLongError
from router.admission import check_request_id, check_sampling, prompt_ids, resolve
from router.frontend_types import ChatMessage, ChatPrompt, FrontRequest, ModelCard
from tandem.sampling import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS, SamplingParams

CARD = ModelCard(name="m", version="1", max_model_len=64, vocab_size=1000, fingerprint="", dtype="float32")


class _Letters:
    """One token per character."""

    eos_token_ids = (0,)

    def encode(self, text):
        return [ord(c) % 1000 for c in text]

    def chat(self, messages):
        return [1] + [ord(c) % 1000 for m in messages for c in m["content"]]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_k", 2**31),
        ("top_p", 0.0),
        ("top_p", math.nan),
        ("min_p", 1.1),
        ("repetition_penalty", 1e-308),  # logits divided by it overflow
        ("presence_penalty", math.nan),
        ("frequency_penalty", 3.0),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1000: 1.0}),
        ("logit_bias", dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 1.0)),
        ("seed", 2**64),
        ("n", 0),
        ("n", 10**6),
        ("logprobs", 21),
        ("stop", ("",)),
        ("stop", ("x" * 2000,)),
        ("stop", tuple(map(str, range(100_000)))),
        ("stop_token_ids", (1000,)),
        ("stop_token_ids", (5,) * (MAX_STOP_TOKEN_IDS + 1)),
    ],
)
def test_sampling_that_cannot_be_served_is_refused_by_name(field, value):
    with pytest.raises(InvalidRequestError, match=field):
        check_sampling(SamplingParams(**{field: value}), CARD)


def test_every_contradiction_is_named_at_once():
    with pytest.raises(InvalidRequestError, match=r"temperature .*; top_p .*; n "):
        check_sampling(SamplingParams(temperature=-1, top_p=2, n=0), CARD)


@pytest.mark.parametrize("prompt", ["", (), ChatPrompt(()), (1000,), (-1,), ChatPrompt((ChatMessage("tool", "x"),))])
async def test_prompts_that_cannot_be_served(prompt):
    with pytest.raises(InvalidRequestError) as refused:
        await prompt_ids(FrontRequest(prompt, SamplingParams()), _Letters(), CARD)
    assert not isinstance(refused.value, PromptTooLongError)


@pytest.mark.parametrize("prompt", [(5,) * 64, (-1,) * 10**6, "x" * 10**6, ChatPrompt((ChatMessage("user", "x" * 10**6),))])
async def test_prompts_that_are_too_long_are_not_even_looked_at(prompt):
    with pytest.raises(PromptTooLongError, match="64"):
        await prompt_ids(FrontRequest(prompt, SamplingParams()), _Letters(), CARD)


def test_max_tokens_must_fit_the_context():
    with pytest.raises(PromptTooLongError, match="lower max_tokens to 4"):
        resolve(SamplingParams(max_tokens=5), 60, CARD, "r")
    resolved = resolve(SamplingParams(), 60, CARD, "r")
    assert resolved.max_tokens == 4
    assert resolved.seed is not None
    with pytest.raises(PromptTooLongError):
        resolve(SamplingParams(), 64, CARD, "r")


@pytest.mark.parametrize("request_id", ["a/b", "a\nb", "x" * 129])
def test_request_ids_that_could_be_mistaken(request_id):
    with pytest.raises(InvalidRequestError, match="request_id"):
        check_request_id(request_id)
