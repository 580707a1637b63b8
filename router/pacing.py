"""When the first token is given to its user. Deciding code.

After a hand-off the second token comes late: KV has to arrive, and the request to join those who decode there. Where that gap
would use up much of the limit of gaps, and the limit of the first token has time left, the first token waits for the second.
"""

from __future__ import annotations

from dataclasses import replace

from router.policy import Candidate, Decision, Need
from router.ranking import NEAR

HOLD_FROM = 0.5
"""Part of the limit of gaps that is predicted to be used, from which on the first token waits."""


def paced(need: Need, decision: Decision) -> Decision:
    """With the time until which the first token may be kept, and with what is predicted when it is."""
    limit_s, ttft_s = need.slo.gap_s, need.slo.ttft_s
    if not decision.candidates or limit_s is None or ttft_s is None:
        return decision
    from_s, kept_s = HOLD_FROM * limit_s, NEAR * ttft_s
    late = [_late(one, from_s) for one in decision.candidates]
    if not any(late):
        return decision
    candidates = tuple(_held(one, kept_s) if held else one for one, held in zip(decision.candidates, late, strict=True))
    return replace(decision, candidates=candidates, hold_until=need.now + kept_s if late[0] else None)


def _late(candidate: Candidate, from_s: float) -> bool:
    return candidate.pair.prefill is not None and candidate.gap_s > from_s


def _held(candidate: Candidate, kept_s: float) -> Candidate:
    """Its first token comes with the second, when that is in time."""
    held_s = candidate.transfer_s + candidate.step_s
    if candidate.ttft_s + held_s > kept_s:
        return candidate
    step_s = candidate.step_s
    return candidate._replace(ttft_s=candidate.ttft_s + held_s, held_s=held_s, gap_s=step_s, tpot_s=step_s)
