"""The router's parts as OpenAI's answers: whole ones and streamed chunks of both APIs. Deciding code: no I/O, no clock.

A chat's first chunk carries the role together with the first text, not ahead of it: a client that measures its time to
the first chunk then measures the first token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from itertools import groupby
from operator import attrgetter
from typing import Any, Protocol

from router.frontend_types import ChoiceFinished, Finished, ModelCard, Part, Started, Token, TokenBatch
from router.openai_types import ApiCall

LOGPROB_MIN = -9999.0
"""Stands for minus infinity, as in OpenAI's answers: JSON has no infinities."""

Json = dict[str, Any]


@dataclass(slots=True)
class _Choice:
    index: int
    num_chars: int = 0
    opened: bool = False  # its first chunk is out
    texts: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    finish_reason: str | None = None


class Reply:
    """Collects one call's parts. Streamed: send what `chunks` returns, then `closing_chunks`. Whole: send `whole`."""

    def __init__(
        self, call: ApiCall, card: ModelCard, request_id: str, created: int, token_bytes: Callable[[int], bytes]
    ) -> None:
        """`created` in Unix seconds; `token_bytes` gives one token's bytes, for showing log-probabilities."""
        self._call = call
        self._api: _Api = _Chat() if call.chat else _Completion()
        self._names = _Names(token_bytes)
        self._choices = [_Choice(i) for i in range(len(call.requests) * call.choices_per_prompt)]
        self._usages: list[Finished] = []
        self._head = {
            "id": f"{self._api.id_prefix}-{request_id}",
            "created": created,
            "model": call.model,
            "system_fingerprint": f"fp_{card.fingerprint[:12]}",
        }

    @property
    def shows_ids(self) -> bool:
        return self._call.return_token_ids

    def plain_choice(self, prompt: int, tokens: tuple[Token, ...]) -> int | None:
        """Whose chunk these tokens make, when it is like the one before it but for text and ids (`plain_chunk`)."""
        number = tokens[0].choice
        choice = self._choices[prompt * self._call.choices_per_prompt + number]
        if self._call.logprobs or not choice.opened or (len(tokens) > 1 and any(token.choice != number for token in tokens)):
            return None
        return choice.index

    def plain_chunk(self, index: int, token: Token) -> Json:
        """One that shows nothing but this token, of the choice with this index, and is not its first."""
        return self._chunk([self._dressed(self._api.delta(token.text, first=False), index, (token,), [], None)])

    def chunks(self, prompt: int, part: Part) -> list[Json]:
        """Chunks to send for one part of the answer to prompt number `prompt`."""
        return [self._chunk([made]) for made in self._deltas(prompt, part)]

    def closing_chunks(self) -> list[Json]:
        """What follows the last part: usage, where it was asked for, and where the time went."""
        return [{**self._chunk([]), "usage": self._usage(), **self._ours()}] if self._call.include_usage else []

    def add(self, prompt: int, part: Part) -> None:
        """Takes a part of an answer that is sent as a whole."""
        for choice, text, tokens in self._news(prompt, part):
            choice.texts.append(text)
            choice.tokens += tokens

    def whole(self) -> Json:
        made = [self._whole_choice(choice) for choice in self._choices]
        return {**self._head, "object": self._api.whole_object, "choices": made, "usage": self._usage(), **self._ours()}

    # ---- parts, choice by choice -----------------------------------------------------------------------------------

    def _news(self, prompt: int, part: Part) -> Iterable[tuple[_Choice, str, tuple[Token, ...]]]:
        """(choice, new text, new tokens) of one part; notes offsets and ends on the way."""
        first = prompt * self._call.choices_per_prompt
        match part:
            case TokenBatch(tokens):
                for number, group in groupby(tokens, key=attrgetter("choice")):
                    yield self._tokens(self._choices[first + number], tuple(group))
            case ChoiceFinished(number, reason, tail):
                choice = self._choices[first + number]
                choice.finish_reason = reason.value
                yield choice, tail, ()
            case Started(_, _, _, prompt_text) if prompt_text:
                for choice in self._choices[first : first + self._call.choices_per_prompt]:
                    choice.num_chars = len(prompt_text)
                    yield choice, prompt_text, ()
            case Finished():
                self._usages.append(part)

    def _tokens(self, choice: _Choice, tokens: tuple[Token, ...]) -> tuple[_Choice, str, tuple[Token, ...]]:
        for token in tokens:
            if self._call.logprobs:
                choice.offsets.append(choice.num_chars)
            choice.num_chars += len(token.text)
        return choice, "".join(token.text for token in tokens), tokens

    def _deltas(self, prompt: int, part: Part) -> Iterable[Json]:
        shown = self._call.logprobs or self._call.return_token_ids
        for choice, text, tokens in self._news(prompt, part):
            finish_reason = choice.finish_reason if isinstance(part, ChoiceFinished) else None
            if not (text or finish_reason or (tokens and shown)):
                continue  # half a character, or text that may begin a stop string: it comes later
            made = self._api.delta(text, first=not choice.opened)
            choice.opened = True
            offsets, choice.offsets = choice.offsets, []
            yield self._dressed(made, choice.index, tokens, offsets, finish_reason)

    def _whole_choice(self, choice: _Choice) -> Json:
        made = self._api.message("".join(choice.texts))
        return self._dressed(made, choice.index, choice.tokens, choice.offsets, choice.finish_reason)

    def _dressed(self, made: Json, index: int, tokens: Iterable[Token], offsets: list[int], finish_reason: str | None) -> Json:
        scored = self._api.logprobs(tokens, offsets, self._call, self._names) if self._call.logprobs and offsets else None
        made |= {"index": index, "logprobs": scored, "finish_reason": finish_reason}
        if self._call.return_token_ids:
            made["token_ids"] = [token.token_id for token in tokens]
        return made

    def _chunk(self, choices: list[Json]) -> Json:
        chunk = {**self._head, "object": self._api.chunk_object, "choices": choices}
        if self._call.include_usage:
            chunk["usage"] = None
        return chunk

    def _ours(self) -> Json:
        """Beyond OpenAI's fields, as `tandem generate --json` shows it: times and workers of the first prompt."""
        if not self._usages:
            return {}
        first = self._usages[0]
        timing = {name.removesuffix("_s"): value for name, value in asdict(first.timing).items()}
        placement = {"prefill": first.placement.prefill, "decode": first.placement.decode}
        return {"tandem": {"timing_s": timing, "placement": placement, "failovers": first.failovers}}

    def _usage(self) -> Json:
        prompt = sum(part.usage.prompt_tokens for part in self._usages)
        completion = sum(part.usage.completion_tokens for part in self._usages)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(part.usage.cached_tokens for part in self._usages)},
        }


# ---- what differs between the two APIs -----------------------------------------------------------------------------


class _Api(Protocol):
    id_prefix: str
    whole_object: str
    chunk_object: str

    def message(self, text: str) -> Json: ...
    def delta(self, text: str, *, first: bool) -> Json: ...
    def logprobs(self, tokens: Iterable[Token], offsets: list[int], call: ApiCall, names: _Names) -> Json: ...


class _Completion:
    id_prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def message(self, text: str) -> Json:
        return {"text": text}

    def delta(self, text: str, *, first: bool) -> Json:
        return {"text": text}

    def logprobs(self, tokens: Iterable[Token], offsets: list[int], call: ApiCall, names: _Names) -> Json:
        rows = list(tokens)
        tops = [{names.text(t.token_id): finite(t.logprob)} | _alternatives(t, call, names) for t in rows]
        return {
            "tokens": [names.text(t.token_id) for t in rows],
            "token_logprobs": [finite(t.logprob) for t in rows],
            "top_logprobs": tops if call.requests[0].sampling.logprobs else None,
            "text_offset": offsets,
        }


class _Chat:
    id_prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def message(self, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def delta(self, text: str, *, first: bool) -> Json:
        if first:
            return {"delta": {"role": "assistant", "content": text}}
        return {"delta": {"content": text} if text else {}}

    def logprobs(self, tokens: Iterable[Token], offsets: list[int], call: ApiCall, names: _Names) -> Json:
        most = call.requests[0].sampling.logprobs or 0
        content = [
            names.entry(t.token_id, t.logprob) | {"top_logprobs": [names.entry(i, p) for i, p in t.top_logprobs[:most]]}
            for t in tokens
        ]
        return {"content": content, "refusal": None}


def _alternatives(token: Token, call: ApiCall, names: _Names) -> Json:
    most = call.requests[0].sampling.logprobs or 0
    return {names.text(i): finite(p) for i, p in token.top_logprobs[:most]}


@dataclass(frozen=True, slots=True)
class _Names:
    """Tokens as OpenAI names them: their text, or `bytes:\\xNN` for part of a character."""

    token_bytes: Callable[[int], bytes]

    def text(self, token_id: int) -> str:
        raw = self.token_bytes(token_id)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def entry(self, token_id: int, logprob: float | None) -> Json:
        return {"token": self.text(token_id), "logprob": finite(logprob), "bytes": list(self.token_bytes(token_id))}


def finite(logprob: float | None) -> float | None:
    """A number that JSON can hold."""
    if logprob is None:
        return None
    return logprob if math.isfinite(logprob) else LOGPROB_MIN
