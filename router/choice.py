"""One choice as text: tokens in, text out, ended at the first stop string. Deciding code."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Protocol

from core.detokenize import StopMatcher, StreamDecoder
from core.request import FinishReason, TokenEvent
from router.frontend_types import Token


class Decoders(Protocol):
    def stream(self) -> StreamDecoder: ...


class ChoiceText:
    """Text is handed out only when it cannot be part of a stop string any more; after a match nothing comes.

    The token that ends the choice as a stop id has no text: it is the model's full stop, not part of what it said.
    """

    def __init__(self, choice: int, decoder: StreamDecoder, stops: Sequence[str], stop_ids: Collection[int]) -> None:
        self.choice = choice
        self.num_tokens = 0
        self.stopped = False
        self._decoder = decoder
        self._matcher = StopMatcher(stops) if stops else None
        self._stop_ids = stop_ids

    def take(self, tokens: Iterable[TokenEvent]) -> list[Token]:
        """The tokens with their text, up to and including the one that completes a stop string."""
        taken: list[Token] = []
        for event in tokens:
            if self.stopped:
                break
            self.num_tokens += 1
            token_id = event.token_id
            text = "" if token_id in self._stop_ids else self._decoder.push(token_id)
            if self._matcher is not None and text:
                text, self.stopped = self._matcher.push(text)
            taken.append(Token(self.choice, event.position, token_id, text, event.logprob, event.top_logprobs))
        return taken

    def end(self, reason: FinishReason) -> tuple[FinishReason, str]:
        """Why it ended as the user sees it, and the text that was held back. Call once."""
        if self.stopped:
            return FinishReason.STOP, ""
        tail = self._decoder.flush()
        if self._matcher is None:
            return reason, tail
        shown, matched = self._matcher.push(tail)
        return (FinishReason.STOP, shown) if matched else (reason, shown + self._matcher.flush())
