"""What a journey is given, and one placement of it. Deciding code."""

from __future__ import annotations

from dataclasses import dataclass, replace

from core.request import AttemptKey, Slo, WorkItem
from router.tokenlog import TokenLog
from tandem.sampling import SamplingParams

NO_LIMITS = Slo()


@dataclass(frozen=True, slots=True)
class Limits:
    """`max_attempts` counts placements that failed, not refusals: those end with the queue's time."""

    queue_timeout_s: float = 60.0
    request_timeout_s: float = 600.0
    max_attempts: int = 8
    answer_timeout_s: float = 5.0
    """For what a worker answers at once, and for a token that another one overtook."""
    opened_timeout_s: float = 60.0
    """For prefill to admit; the policy keeps its queue short."""
    timeout_name: str = "router.request_timeout_s"
    """Who set `request_timeout_s`."""

    def of(self, spec: JourneySpec) -> Limits:
        """Of one journey: its own deadline where that is sooner."""
        if spec.deadline_s is None or spec.deadline_s >= self.request_timeout_s:
            return self
        return replace(self, request_timeout_s=spec.deadline_s, timeout_name="deadline_s")


@dataclass(frozen=True, slots=True)
class JourneySpec:
    """`request_id` is the workers' name for this choice (`ID`, `ID/1`, …); `sampling` has seed and max_tokens resolved.

    What `slo_class`, `tenant`, `priority` and `deadline_s` mean: `router.slo.Terms`.
    """

    request_id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    choice: int = 0
    eos_token_ids: tuple[int, ...] = ()
    cache_salt: bytes = b""
    first_attempt: int = 1
    slo: Slo = NO_LIMITS
    slo_class: str = ""
    tenant: str = ""
    priority: int = 0
    deadline_s: float | None = None

    @property
    def max_tokens(self) -> int:
        assert self.sampling.max_tokens is not None, "the front resolved it"
        return self.sampling.max_tokens

    def stop_ids(self) -> set[int]:
        """Tokens that end it."""
        ids = set(self.sampling.stop_token_ids)
        return ids if self.sampling.ignore_eos else ids.union(self.eos_token_ids)

    def item(self, attempt: int, so_far: tuple[int, ...], remaining_s: float) -> WorkItem:
        """What a worker is given that goes on behind these tokens of the answer."""
        sampling = self.sampling
        if sampling.stop or sampling.n > 1:
            sampling = replace(sampling, stop=(), n=1)  # stop strings and siblings are the router's affair
        return WorkItem(
            key=AttemptKey(self.request_id, attempt),
            token_ids=self.prompt + so_far,
            prompt_len=len(self.prompt),
            sampling=sampling,
            choice=self.choice,
            eos_token_ids=self.eos_token_ids,
            cache_salt=self.cache_salt,
            remaining_s=max(remaining_s, 1e-3),
        )


class Attempt:
    """One placement. `legs` are the workers on which it may still run or hold something; `hold_until`: see `events.Placed`."""

    __slots__ = ("base", "decode", "hold_until", "item", "key", "legs", "prefill")

    def __init__(self, item: WorkItem, prefill: str | None, decode: str, hold_until: float | None = None) -> None:
        self.key = item.key
        self.item = item
        self.base = item.position
        self.prefill = prefill
        self.decode = decode
        self.hold_until = hold_until
        self.legs: set[str] = set()

    def keeps(self, now: float, log: TokenLog) -> bool:
        """The first token, just taken, waits for the second."""
        return self.hold_until is not None and now < self.hold_until and len(log) == 1 and log.finished is None
