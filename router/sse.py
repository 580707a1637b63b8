"""A reply as server-sent events. Deciding code: no I/O, no clock.

Nearly every chunk of a stream is the one before it with another text. Those are cut from a frame, made once per choice from
a real chunk, so that what a chunk looks like is said in one place (`openai_replies`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import NamedTuple

from router.frontend_types import Part, Token, TokenBatch
from router.openai_replies import Json, Reply

DONE = b"data: [DONE]\n\n"

_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
_quote: Callable[[str], str] = json.encoder.encode_basestring
_TEXT_HOLE, _IDS_HOLE = "\0", -1
_SAMPLE = Token(0, 0, _IDS_HOLE, _TEXT_HOLE)


class _Frame(NamedTuple):
    """What stands before the text, between it and the token ids (all that follows, where they are not shown), and after."""

    head: str
    middle: str
    tail: str


class EventStream:
    """The events of one streamed call, in the order in which `Reply.chunks` would make its chunks."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self._frames: dict[int, _Frame] = {}

    def events(self, prompt: int, part: Part) -> bytes:
        """Of one part of the answer to prompt number `prompt`; nothing where it has nothing to show yet."""
        if type(part) is TokenBatch and (plain := self._plain(prompt, part.tokens)) is not None:
            return plain
        return b"".join(map(event, self._reply.chunks(prompt, part)))

    def closing(self) -> bytes:
        """After the last part."""
        return b"".join(map(event, self._reply.closing_chunks())) + DONE

    def _plain(self, prompt: int, tokens: tuple[Token, ...]) -> bytes | None:
        """None where there is more to a chunk than its text and ids, or tokens of several choices."""
        number = self._reply.plain_choice(prompt, tokens)
        if number is None:
            return None
        text = tokens[0].text if len(tokens) == 1 else "".join([token.text for token in tokens])
        with_ids = self._reply.shows_ids
        if not text:
            return None if with_ids else b""
        head, middle, tail = self._frames.get(number) or self._frame(number)
        if with_ids:
            return f"{head}{_quote(text)}{middle}{','.join([str(token.token_id) for token in tokens])}{tail}".encode()
        return f"{head}{_quote(text)}{middle}".encode()

    def _frame(self, number: int) -> _Frame:
        whole = f"data: {_encode(self._reply.plain_chunk(number, _SAMPLE))}\n\n"
        head, _, rest = whole.rpartition(_quote(_TEXT_HOLE))  # the last one: ids and names of the user's come before it
        middle, _, tail = rest.partition(str(_IDS_HOLE))
        frame = self._frames[number] = _Frame(head, middle, tail)
        return frame


def event(value: Json) -> bytes:
    return b"data: " + _encode(value).encode() + b"\n\n"
