"""OpenAI's request bodies, read strictly, and turned into what the router understands.

Fields that OpenAI has and that change nothing here (`user`, `metadata` …) are accepted. Fields that ask for something we
do not do (tools, images, JSON schemas) are refused with a message that says so. Any other unknown field is refused, as
OpenAI does: a misspelt option must not be ignored silently. Our extensions stand beside OpenAI's fields in the body.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import pydantic_core
from pydantic import BaseModel, ConfigDict, ValidationError

from core.request import Slo
from router.frontend_types import ChatMessage, ChatPrompt, FrontRequest
from router.openai_fields import FieldError, content_of, logit_bias_of, prompts_of, seed_of, short, stop_of
from tandem.sampling import SamplingParams

COMPLETION_TOKENS_DEFAULT = 16
"""What OpenAI's completions give when max_tokens is not set; chats go on until the model stops."""


@dataclass(frozen=True, slots=True)
class ApiCall:
    """One HTTP call: one router request per prompt, and how the answer is to look."""

    chat: bool
    model: str
    requests: tuple[FrontRequest, ...]
    stream: bool
    include_usage: bool
    logprobs: bool
    return_token_ids: bool

    @property
    def choices_per_prompt(self) -> int:
        return self.requests[0].sampling.n


_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")  # it comes back in a header


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class _Call(_Body):
    """What both APIs share."""

    model: str
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: Any = None
    max_tokens: int | None = None
    # accepted and without effect
    user: str | None = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    # ours
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None
    request_id: str | None = None
    slo_class: str | None = None
    ttft_slo_s: float | None = None
    tbt_slo_s: float | None = None
    tpot_slo_s: float | None = None
    priority: int | None = None
    tenant: str | None = None
    deadline_s: float | None = None

    def sampling(self, logprobs: int | None, max_tokens: int | None) -> SamplingParams:
        """Raises FieldError naming the first value that cannot be served."""
        defaults = SamplingParams()
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=_or(self.temperature, defaults.temperature),
            top_k=_or(self.top_k, defaults.top_k),
            top_p=_or(self.top_p, defaults.top_p),
            min_p=_or(self.min_p, defaults.min_p),
            repetition_penalty=_or(self.repetition_penalty, defaults.repetition_penalty),
            presence_penalty=_or(self.presence_penalty, defaults.presence_penalty),
            frequency_penalty=_or(self.frequency_penalty, defaults.frequency_penalty),
            logit_bias=logit_bias_of(self.logit_bias or {}),
            seed=seed_of(self.seed),
            n=_or(self.n, 1),
            logprobs=logprobs,
            stop=stop_of(self.stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
        )
        if problems := params.problems():
            field = problems[0].split()[0]
            raise FieldError(field if field in type(self).model_fields else None, "; ".join(problems))
        return params

    def front(self, prompt: str | tuple[int, ...] | ChatPrompt, sampling: SamplingParams, echo: bool = False) -> FrontRequest:
        if not -(2**31) <= (self.priority or 0) < 2**31:
            raise FieldError("priority", "priority must fit in 32 bits")
        if self.request_id and not _REQUEST_ID.fullmatch(self.request_id):
            raise FieldError("request_id", "request_id takes at most 128 letters, digits and -_.:")
        slo = Slo(self.ttft_slo_s, self.tbt_slo_s, self.tpot_slo_s)
        return FrontRequest(
            prompt,
            sampling,
            self.request_id or "",
            self.slo_class or "",
            slo,
            self.priority or 0,
            echo,
            self.tenant or "",
            self.deadline_s,
        )

    def common(self) -> dict[str, Any]:
        if self.stream_options is not None and not self.stream:
            raise FieldError("stream_options", "stream_options is only allowed together with stream=true")
        return {
            "model": self.model,
            "stream": bool(self.stream),
            "include_usage": self.stream_options is not None and self.stream_options.include_usage,
            "return_token_ids": bool(self.return_token_ids),
        }


class _Completion(_Call):
    prompt: Any
    echo: bool | None = None
    best_of: int | None = None
    logprobs: int | None = None
    suffix: Any = None

    UNSUPPORTED: ClassVar = {"suffix": "inserting text before a suffix is not supported; leave `suffix` out"}

    def call(self) -> ApiCall:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise FieldError("best_of", f"best_of must equal n ({self.n or 1}): every candidate is returned here")
        if self.echo and self.logprobs is not None:
            raise FieldError("echo", "echo together with logprobs is not supported: prompt tokens are not scored; drop one")
        sampling = self.sampling(self.logprobs, _or(self.max_tokens, COMPLETION_TOKENS_DEFAULT))
        prompts = prompts_of(self.prompt)
        requests = tuple(self.front(prompt, sampling, bool(self.echo)) for prompt in prompts)
        if self.request_id and len(requests) > 1:
            raise FieldError("request_id", "request_id names one request; send the prompts one by one or leave it out")
        return ApiCall(False, requests=requests, logprobs=self.logprobs is not None, **self.common())


class _Message(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Any = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: Any = None
    audio: Any = None

    def message(self, path: str) -> ChatMessage:
        for field in ("tool_calls", "audio"):
            if getattr(self, field):
                raise FieldError(f"{path}.{field}", f"{field} in messages is not supported")
        role = "system" if self.role == "developer" else self.role
        return ChatMessage(role, content_of(self.content, f"{path}.content", may_be_empty=self.role == "assistant"))


class _Chat(_Call):
    messages: list[_Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: Any = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    web_search_options: Any = None
    verbosity: Any = None

    UNSUPPORTED: ClassVar = {
        "tools": "tools are not supported; leave `tools` out",
        "functions": "functions are not supported; leave `functions` out",
        "audio": "audio output is not supported; leave `audio` out",
        "prediction": "predicted outputs are not supported; leave `prediction` out",
        "reasoning_effort": "reasoning_effort is not supported; leave it out",
        "web_search_options": "web search is not supported; leave `web_search_options` out",
        "verbosity": "verbosity is not supported; leave it out",
    }

    def call(self) -> ApiCall:
        self._refuse_formats()
        if not self.messages:
            raise FieldError("messages", "messages must hold at least one message")
        if self.top_logprobs is not None and not self.logprobs:
            raise FieldError("top_logprobs", "top_logprobs needs logprobs=true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise FieldError("max_tokens", "max_tokens and max_completion_tokens differ; send only max_completion_tokens")
        alternatives = _or(self.top_logprobs, 0) if self.logprobs else None
        sampling = self.sampling(alternatives, _or(self.max_completion_tokens, self.max_tokens))
        chat = ChatPrompt(tuple(m.message(f"messages.{i}") for i, m in enumerate(self.messages)))
        return ApiCall(True, requests=(self.front(chat, sampling),), logprobs=bool(self.logprobs), **self.common())

    def _refuse_formats(self) -> None:
        form = self.response_format
        if form is not None and form != {"type": "text"}:
            raise FieldError(
                "response_format", 'only response_format {"type": "text"} is supported; ask for JSON in the prompt'
            )
        if self.modalities not in (None, [], ["text"]):
            raise FieldError("modalities", 'only the modality "text" is supported')
        for field in ("tool_choice", "function_call"):
            if getattr(self, field) not in (None, "none", "auto"):
                raise FieldError(field, f"tools are not supported; leave `{field}` out")


def read_chat(body: bytes) -> ApiCall:
    """Reads the body of /v1/chat/completions. Raises InvalidRequestError, mostly FieldError."""
    return _read(_Chat, _Chat.UNSUPPORTED, body).call()


def read_completion(body: bytes) -> ApiCall:
    """Reads the body of /v1/completions. Raises InvalidRequestError, mostly FieldError."""
    return _read(_Completion, _Completion.UNSUPPORTED, body).call()


_T = TypeVar("_T")
_C = TypeVar("_C", _Chat, _Completion)


def _read(kind: type[_C], unsupported: dict[str, str], body: bytes) -> _C:
    try:
        tree = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise FieldError(None, f"the body is not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise FieldError(None, f"the body must be a JSON object, found {type(tree).__name__}")
    for field, message in unsupported.items():
        if tree.get(field):
            raise FieldError(field, message)
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise _explain(error) from None


def _explain(error: ValidationError) -> FieldError:
    first = error.errors(include_url=False, include_context=False)[0]
    path = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return FieldError(path, f"unrecognized field: {path}; check its spelling or leave it out")
    if first["type"] == "missing":
        return FieldError(path, f"you must provide {path}")
    return FieldError(path, f"{path}: {first['msg']} (got {short(first['input'])})")


def _or(value: _T | None, default: _T) -> _T:
    return default if value is None else value
