"""From what a user asked to what a journey needs: checked, tokenized, every open value resolved."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import OrderedDict
from dataclasses import replace
from typing import Protocol

from core.detokenize import StreamDecoder
from core.errors import InvalidRequestError, PromptTooLongError
from router.attempt import JourneySpec
from router.frontend_types import ChatPrompt, FrontRequest, ModelCard
from router.slo import Terms
from tandem.sampling import SamplingParams

log = logging.getLogger(__name__)

INLINE_CHARS_MAX = 4096
"""Longer texts are tokenized in a thread, so that one long prompt delays nobody's tokens."""
CHARS_PER_TOKEN_MAX = 64
"""A text longer than the context by this factor cannot fit, whatever its tokens are; it is refused unread."""
REQUEST_ID_CHARS_MAX = 128
CHAT_ROLES = ("system", "user", "assistant")
REMEMBERED_IDS = 4096


class Text(Protocol):
    """What is needed of `core.text.Tokenizer`."""

    eos_token_ids: tuple[int, ...]

    def encode(self, text: str) -> list[int]: ...
    def chat(self, messages: list[dict[str, str]]) -> list[int]: ...
    def decode(self, token_ids: tuple[int, ...]) -> str: ...
    def stream(self) -> StreamDecoder: ...


class UsedIds:
    """Attempt numbers of request ids that users chose: one used again goes on counting, because workers still refuse
    the attempts of its first life. Remembers the latest few thousand."""

    def __init__(self) -> None:
        self._last: OrderedDict[str, int] = OrderedDict()

    def first_attempt(self, request_id: str) -> int:
        return self._last.get(request_id, 0) + 1

    def ended(self, request_id: str, last_attempt: int) -> None:
        self._last[request_id] = max(last_attempt, self._last.pop(request_id, 0))
        while len(self._last) > REMEMBERED_IDS:
            self._last.popitem(last=False)


def check_sampling(params: SamplingParams, card: ModelCard) -> None:
    """Raises InvalidRequestError naming everything that contradicts itself or the model."""
    if problems := params.problems():
        raise InvalidRequestError("; ".join(problems))
    for name, ids in (("stop_token_ids", params.stop_token_ids), ("logit_bias", params.logit_bias)):
        bad = next((i for i in ids if not 0 <= i < card.vocab_size), None)
        if bad is not None:
            raise InvalidRequestError(f"{name} names token {bad}, the model's ids end at {card.vocab_size - 1}")


def check_request_id(request_id: str) -> None:
    if len(request_id) > REQUEST_ID_CHARS_MAX or not request_id.isprintable() or "/" in request_id:
        text = f"request_id must be at most {REQUEST_ID_CHARS_MAX} printable characters without '/'; or leave it empty"
        raise InvalidRequestError(text)


async def prompt_ids(request: FrontRequest, text: Text, card: ModelCard) -> tuple[int, ...]:
    """Token ids of the prompt. Raises InvalidRequestError (empty, not encodable, ids out of range) or PromptTooLongError."""
    prompt = request.prompt
    if isinstance(prompt, tuple):
        if len(prompt) >= card.max_model_len:
            raise _too_long(len(prompt), card.max_model_len)
        if prompt and not 0 <= min(prompt) <= max(prompt) < card.vocab_size:
            bad = next(i for i in prompt if not 0 <= i < card.vocab_size)
            raise InvalidRequestError(f"token id {bad} is not of this model, whose ids are 0 to {card.vocab_size - 1}")
        ids = prompt
    else:
        ids = tuple(await _encode(prompt, text, card))
    if not ids:
        raise InvalidRequestError("the prompt is empty; send at least one token or character")
    return ids


def resolve(params: SamplingParams, prompt_len: int, card: ModelCard, request_id: str) -> SamplingParams:
    """Sets max_tokens and seed. Raises PromptTooLongError when prompt and max_tokens do not fit the context."""
    context = card.max_model_len
    if prompt_len >= context:
        raise _too_long(prompt_len, context)
    room = context - prompt_len
    if params.max_tokens is not None and params.max_tokens > room:
        text = f"prompt ({prompt_len}) and max_tokens ({params.max_tokens}) exceed the context of {context} tokens"
        raise PromptTooLongError(f"{text}; lower max_tokens to {room} or less, or shorten the prompt")
    seed = params.seed
    if seed is None:
        seed = secrets.randbits(53)  # fits a JSON number everywhere
        log.debug("request %s: seed %d drawn", request_id, seed)
    return replace(params, max_tokens=params.max_tokens or room, seed=seed)


def journey_spec(
    request_id: str, prompt: tuple[int, ...], sampling: SamplingParams, text: Text, first_attempt: int, terms: Terms
) -> JourneySpec:
    return JourneySpec(
        request_id,
        prompt,
        sampling,
        eos_token_ids=text.eos_token_ids,
        first_attempt=first_attempt,
        slo=terms.slo,
        slo_class=terms.slo_class,
        tenant=terms.tenant,
        priority=terms.priority,
        deadline_s=terms.deadline_s,
    )


def _too_long(tokens: int, context: int) -> PromptTooLongError:
    text = f"the prompt has {tokens} tokens, the context holds {context} with at least one to generate; shorten it"
    return PromptTooLongError(text)


async def _encode(prompt: str | ChatPrompt, text: Text, card: ModelCard) -> list[int]:
    if isinstance(prompt, ChatPrompt):
        if not prompt.messages:
            raise InvalidRequestError("the chat has no messages; send at least one")
        strange = next((message.role for message in prompt.messages if message.role not in CHAT_ROLES), None)
        if strange is not None:
            problem = f"a chat message's role is one of {', '.join(CHAT_ROLES)}, got {strange[:40]!r}"
            raise InvalidRequestError(problem)
        length = sum(len(message.content) for message in prompt.messages)
        messages = [{"role": message.role, "content": message.content} for message in prompt.messages]

        def encode() -> list[int]:
            return text.chat(messages)
    else:
        length = len(prompt)

        def encode() -> list[int]:
            return text.encode(prompt)

        if not prompt:
            raise InvalidRequestError("the prompt is empty; send at least one token or character")
    if length > card.max_model_len * CHARS_PER_TOKEN_MAX:
        raise PromptTooLongError(f"a prompt of {length} characters cannot fit a context of {card.max_model_len} tokens")
    return encode() if length <= INLINE_CHARS_MAX else await asyncio.to_thread(encode)
