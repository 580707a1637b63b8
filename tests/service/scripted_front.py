"""A FrontDoor whose answers are scripted by the prompt, served over HTTP on a real socket; for tests of the HTTP front."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

from core.errors import InternalError, NotFoundError, OverloadedError, UnavailableError
from core.request import FinishReason
from router.decisions import Explanation
from router.frontend_types import (
    ChatPrompt,
    ChoiceFinished,
    Finished,
    FrontRequest,
    ModelCard,
    Part,
    Placement,
    Started,
    Timing,
    Token,
    TokenBatch,
    Usage,
)
from router.http import build_app
from router.web import web_server

MAX_BODY_BYTES = 64 * 1024
WORDS = {1: b"Hello", 2: b" world", 3: b"\xf0\x9f", 4: b"\x98\x80", 5: b"!"}


class Names:
    def token_bytes(self, token_id: int) -> bytes:
        return WORDS[token_id]


class ScriptedFront:
    """Answers "Hello world😀!" in five tokens; a prompt may ask for something else (`fail_late`, `wait` …)."""

    def __init__(self) -> None:
        self.requests: list[FrontRequest] = []
        self.asked = asyncio.Event()
        self.closed = asyncio.Event()  # a request was closed before its end
        self.serving = True

    def model(self) -> ModelCard:
        if not self.serving:
            raise UnavailableError("no worker has loaded the model yet", retry_after_s=1.5)
        return ModelCard("demo", "1", 512, 4096, "ab" * 16, "float32")

    def ready(self) -> bool:
        return self.serving

    def cancel(self, request_id: str) -> bool:
        return False

    def explain(self, request_id: str) -> Explanation:
        raise NotFoundError(f"nothing is known of {request_id!r}")

    async def generate(self, request: FrontRequest) -> AsyncGenerator[Part, None]:
        self.requests.append(request)
        self.asked.set()
        prompt = request.prompt
        script = prompt.messages[-1].content if isinstance(prompt, ChatPrompt) else prompt
        if script == "refuse":
            raise OverloadedError("too busy", retry_after_s=2.5)
        shown = script if request.echo and isinstance(script, str) else ""
        yield Started(request.request_id, 7, 3, shown)
        try:
            if script == "wait":
                await asyncio.Event().wait()
            while script == "flood":
                yield TokenBatch((Token(0, 0, 1, "x" * 100_000),))
            for position, token_id in enumerate((1, 2, 3, 4, 5)):
                yield TokenBatch(tuple(self._token(request, c, position, token_id) for c in range(request.sampling.n)))
                if script in ("fail_late", "crash") and position == 1:
                    error: Exception = InternalError("worker fault") if script == "fail_late" else KeyError("secret")
                    raise error
        except (GeneratorExit, asyncio.CancelledError):
            self.closed.set()
            raise
        for choice in range(request.sampling.n):
            yield ChoiceFinished(choice, FinishReason.LENGTH, "")
        yield Finished(Usage(7, 4, 5 * request.sampling.n), Timing(), Placement("p", "d"), 0)

    def _token(self, request: FrontRequest, choice: int, position: int, token_id: int) -> Token:
        text = {3: "", 4: "😀"}.get(token_id) if token_id in (3, 4) else WORDS[token_id].decode()
        assert text is not None
        if request.sampling.logprobs is None:
            return Token(choice, position, token_id, text)
        tops = ((token_id, -0.25), (5, float("-inf")))[: request.sampling.logprobs]
        return Token(choice, position, token_id, text, -0.25, tops)


@asynccontextmanager
async def serving(front: ScriptedFront) -> AsyncIterator[str]:
    """The app on a free port; yields its base URL."""
    app = build_app(front, Names(), lambda: b"tandem_up 1\n", MAX_BODY_BYTES)
    async with web_server(app, "127.0.0.1:0", 0.2) as address:
        yield f"http://{address}"
