"""Single fields of OpenAI's bodies that take more than one form, each turned into its one plain value."""

from __future__ import annotations

from typing import Any

from core.errors import InvalidRequestError

PROMPTS_MAX = 128
"""Prompts of one call; `n` multiplies them."""


class FieldError(InvalidRequestError):
    """A fault of one field of the body, named by its path (`messages.0.content`)."""

    def __init__(self, param: str | None, message: str) -> None:
        super().__init__(message)
        self.param = param


def seed_of(seed: int | None) -> int | None:
    """OpenAI's seeds are signed 64-bit numbers; ours are the same bits unsigned."""
    if seed is not None and not -(2**63) <= seed < 2**64:
        raise FieldError("seed", f"seed must fit in 64 bits, got {seed}")
    return None if seed is None else seed % 2**64


def stop_of(stop: Any) -> tuple[str, ...]:
    if stop is None:
        return ()
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(s, str) for s in stops):
        raise FieldError("stop", f"stop must be a string or a list of strings (got {short(stop)})")
    return tuple(stops)


def logit_bias_of(biases: dict[str, float]) -> dict[int, float]:
    for key in biases:
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise FieldError("logit_bias", f"logit_bias maps token ids to numbers, {key!r} is no token id")
    return {int(key): bias for key, bias in biases.items()}


def prompts_of(prompt: Any) -> list[str | tuple[int, ...]]:
    """A prompt is text or token ids; several are a list of either."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if _is_ids(prompt):
            return [tuple(prompt)]
        if len(prompt) > PROMPTS_MAX:
            raise FieldError("prompt", f"at most {PROMPTS_MAX} prompts per call, got {len(prompt)}; send them in several calls")
        if all(isinstance(one, str) for one in prompt) or all(isinstance(one, list) and _is_ids(one) for one in prompt):
            return [one if isinstance(one, str) else tuple(one) for one in prompt]
    if prompt == []:
        raise FieldError("prompt", "the prompt is empty; send text or token ids")
    raise FieldError("prompt", f"prompt must be text, a list of texts, token ids or a list of those (got {short(prompt)})")


def _is_ids(values: list[Any]) -> bool:
    return all(type(v) is int for v in values)


def content_of(content: Any, path: str, *, may_be_empty: bool) -> str:
    if isinstance(content, str):
        return content
    if content is None and may_be_empty:
        return ""
    if not isinstance(content, list):
        raise FieldError(path, f"{path} must be text or a list of text parts (got {short(content)})")
    return "".join(_part(part, f"{path}.{i}") for i, part in enumerate(content))


def _part(part: Any, path: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text":
        raise FieldError(path, f"{path}: only parts of type text are supported, this model reads no images, audio or files")
    text = part.get("text")
    if not isinstance(text, str):
        raise FieldError(path, f"{path}.text must be a string (got {short(text)})")
    return text


def short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
