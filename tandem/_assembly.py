"""What both clients do with a stream, without any I/O: collect tokens, build the result, decide on retries."""

from __future__ import annotations

from dataclasses import dataclass, field

from tandem._convert import FINISH_NAMES, placement_from_pb, timing_from_pb, token_from_pb, usage_from_pb
from tandem.connection import RetryPolicy
from tandem.errors import InternalError, TandemError, UnavailableError
from tandem.results import Choice, Placement, Result, Timing, Token, TopLogprob, Usage
from tandem.v1 import inference_pb2 as inference

HELD_BACK = -1  # token id of text that came after its choice's last token


@dataclass(slots=True)
class _Answer:
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[tuple[TopLogprob, ...]] = field(default_factory=list)
    finish_reason: str = ""

    def add(self, token: Token) -> None:
        self.texts.append(token.text)
        self.token_ids.append(token.token_id)
        self.logprobs.append(token.logprob)
        self.top_logprobs.append(token.top_logprobs)

    def choice(self, unfinished: str) -> Choice:
        scored = any(p is not None for p in self.logprobs)
        return Choice(
            text="".join(self.texts),
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason or unfinished,
            logprobs=tuple(self.logprobs) if scored else (),
            top_logprobs=tuple(self.top_logprobs) if scored else (),
        )


class Assembly:
    """The state of one stream. Feed it every message (`receive`), the end (`end`) or the error (`fail`)."""

    def __init__(self, request: inference.GenerateRequest, retry: RetryPolicy) -> None:
        self.request = request
        self.request_id: str = request.request_id
        self.done = False
        self.cancelled = False  # by our own caller
        self._retry = retry
        self._retries = 0
        self._heard = False
        self._error: TandemError | None = None
        self._answers = [_Answer() for _ in range(max(1, request.sampling.n))]
        self._started = inference.Started()
        self._finished: inference.Finished | None = None

    def receive(self, message: inference.GenerateResponse) -> list[Token]:
        """Tokens of one message, in order."""
        self._heard = True
        part = message.WhichOneof("part")
        if part == "tokens":
            return [self._token(token_from_pb(t)) for t in message.tokens.tokens]
        if part == "choice_finished":
            return self._finish_choice(message.choice_finished)
        if part == "started":
            self._started = message.started
            self.request_id = message.started.request_id
        elif part == "finished":
            self._finished = message.finished
        return []

    def end(self) -> None:
        """The server closed the stream without an error. Raises InternalError when its result is missing."""
        self.done = True
        if self._finished is None:
            self._error = InternalError("the stream ended without its result; is the server of another version?")
            raise self._error

    def fail(self, error: TandemError) -> float:
        """Seconds to wait before starting the call again; raises `error` when that is not safe or no use.

        Safe is only UNAVAILABLE before the first message: from then on the request has begun to be answered.
        """
        may_retry = isinstance(error, UnavailableError) and not self._heard and not self.cancelled
        if may_retry and self._retries < self._retry.max_retries:
            self._retries += 1
            return self._retry.delay_s(self._retries - 1)
        self.done = True
        if isinstance(error, UnavailableError) and self._heard:
            text = f"the answer broke off, it may be asked for again with the same seed ({error})"
            error = type(error)(text, retry_after_s=error.retry_after_s)
        self._error = error
        raise error

    def stopped_by_caller(self) -> None:
        """The call ended because our caller cancelled it: what came so far is the result."""
        self.done = True

    @property
    def result(self) -> Result:
        """Raises the stream's error if it had one, TandemError while it is still running."""
        if self._error is not None:
            raise self._error
        if not self.done:
            raise TandemError("the stream has not ended; read its tokens to the end before asking for the result")
        finished = self._finished
        return Result(
            request_id=self.request_id,
            choices=tuple(a.choice(unfinished="cancelled") for a in self._answers),
            usage=usage_from_pb(finished.usage) if finished else self._usage_so_far(),
            timing=timing_from_pb(finished.timing) if finished else Timing(),
            placement=placement_from_pb(finished.placement) if finished else Placement(),
            failovers=finished.failovers if finished else 0,
            seed=self._started.seed,
            prompt_text=self._started.prompt_text,
        )

    def _token(self, token: Token) -> Token:
        self._answer(token.choice).add(token)
        return token

    def _finish_choice(self, message: inference.ChoiceFinished) -> list[Token]:
        answer = self._answer(message.choice)
        answer.finish_reason = FINISH_NAMES.get(message.finish_reason, "error")
        if not message.tail_text:
            return []
        answer.texts.append(message.tail_text)
        return [Token(message.tail_text, HELD_BACK, len(answer.token_ids), choice=message.choice)]

    def _answer(self, choice: int) -> _Answer:
        if choice >= len(self._answers):
            raise InternalError(f"the server sent choice {choice} of a request for {len(self._answers)}")
        return self._answers[choice]

    def _usage_so_far(self) -> Usage:
        return Usage(self._started.prompt_tokens, 0, sum(len(a.token_ids) for a in self._answers))
