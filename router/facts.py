"""Where the time of a journey went: instants on the router's clock, lengths from the workers'. Deciding code."""

from __future__ import annotations

from dataclasses import dataclass, field

from core.request import AttemptTiming
from router.frontend_types import Placement, Timing
from router.occupancy import Mark

NOWHERE = Placement("", "")


@dataclass(slots=True)
class Facts:
    """Filled by the journey. Instants are None until they happen; timings are those of the last attempt that had them."""

    arrived_at: float
    sent_at: float | None = None  # first handed to a worker that computes
    first_token_at: float | None = None
    last_token_at: float | None = None
    finished_at: float | None = None
    num_tokens: int = 0
    failovers: int = 0
    cached_tokens: int = 0
    placement: Placement = NOWHERE
    prefill: AttemptTiming = field(default_factory=AttemptTiming)
    decode: AttemptTiming = field(default_factory=AttemptTiming)
    second_token_at: float | None = None
    held_since: float | None = None  # the first token was here, and kept (`router.pacing`)
    decoding_since: Mark | None = None

    def placed(self, prefill: str, decode: str) -> None:
        self.placement = Placement(prefill, decode)

    def sent(self, now: float) -> None:
        if self.sent_at is None:
            self.sent_at = now

    def turned_down(self) -> None:
        """It was handed to somebody who had no room."""
        if not self.failovers:
            self.sent_at = None

    def cached(self, tokens: int) -> None:
        """Prompt tokens not computed because they were cached; of the first attempt, later ones find what it computed."""
        if self.failovers == 0:
            self.cached_tokens = max(self.cached_tokens, tokens)

    def prefill_done(self, timing: AttemptTiming, cached_tokens: int) -> None:
        self.prefill = timing
        self.cached(cached_tokens)

    def joined(self, timing: AttemptTiming) -> None:
        self.decode = timing

    @property
    def first_ready_at(self) -> float | None:
        """When the first token was here: the user may have been given it later."""
        return self.first_token_at if self.held_since is None else self.held_since

    def tokens(self, now: float, count: int) -> None:
        """They are given to the user."""
        if self.first_token_at is None:
            self.first_token_at = now
            if count > 1 and self.held_since is not None:
                self.second_token_at = now
        elif self.second_token_at is None:
            self.second_token_at = now
        self.last_token_at = now
        self.num_tokens += count

    def timing(self, now: float) -> Timing:
        """Seconds for the user; `now` closes what has no end yet."""
        end = self.finished_at if self.finished_at is not None else now
        first, last = self.first_token_at, self.last_token_at
        gaps = self.num_tokens - 1
        return Timing(
            queue_s=(self.sent_at if self.sent_at is not None else end) - self.arrived_at + self.prefill.queue_s,
            prefill_s=self.prefill.prefill_s,
            handoff_wait_s=self.decode.handoff_wait_s,
            transfer_s=self.decode.transfer_s,
            first_decode_s=self._first_decode_s(),
            ttft_s=first - self.arrived_at if first is not None else 0.0,
            tpot_s=(last - first) / gaps if first is not None and last is not None and gaps > 0 else 0.0,
            total_s=end - self.arrived_at,
            transfer_exposed_s=self.decode.transfer_exposed_s,
        )

    def _first_decode_s(self) -> float:
        """Of the gap between the first two tokens, what the hand-off did not take."""
        if self.first_ready_at is None or self.second_token_at is None:
            return 0.0
        gap_s = self.second_token_at - self.first_ready_at
        return max(gap_s - self.decode.transfer_exposed_s - self.decode.handoff_wait_s, 0.0)
