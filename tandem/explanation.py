"""Why a router placed a request where it did: what `Client.explain` gives. Plain frozen data, seconds throughout."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.results import Placement, Timing


@dataclass(frozen=True, slots=True)
class Candidate:
    """A placement that was looked at and what was predicted of it, from the moment of the decision.

    `ttft_s` is the sum of `overhead_s`, `queue_s`, `prefill_s` and `held_s`, for which the first token is kept until the second
    is there; `gap_s` compares with a TBT limit, `tpot_s` with one of mean
    gaps; `transfer_s` is what the hand-off adds to the first gap. The lowest `score` won.
    """

    placement: Placement
    ttft_s: float
    overhead_s: float
    queue_s: float
    prefill_s: float
    transfer_s: float
    gap_s: float
    tpot_s: float
    score: float
    reason: str
    held_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Decision:
    """Made `at_s` after the request arrived. `placement` None: nobody could take it. The chosen candidate is the first."""

    at_s: float
    placement: Placement | None
    reason: str
    candidates: tuple[Candidate, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """`finish` is "stop", "length", "cancelled" or the code of an error that `message` explains."""

    finish: str
    message: str
    timing: Timing
    tokens: int
    cached_tokens: int
    failovers: int
    placement: Placement


@dataclass(frozen=True, slots=True)
class Explanation:
    """One choice of one request; `outcome` None while it runs. `forgotten` decisions came before the ones kept."""

    request_id: str
    policy: str
    slo_class: str
    ttft_slo_s: float | None
    tbt_slo_s: float | None
    tpot_slo_s: float | None
    prompt_tokens: int
    output_tokens: int
    """How long its answer was predicted to become."""
    decisions: tuple[Decision, ...]
    forgotten: int
    outcome: Outcome | None
