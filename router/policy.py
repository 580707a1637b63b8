"""Which workers take a request: the words, the rules that all policies share, and the default. Deciding code."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from core.blocks import BlockKey
from core.request import Slo, WorkerRole
from router.attempt import NO_LIMITS
from router.cost_columns import Column
from router.pools import Mask, Pool, best
from router.situation import Situation

PREFILL_WINDOW_TOKENS = 4096
"""Prompt tokens sent ahead to one prefill worker. Decode memory is reserved first, so what cannot start soon waits here."""

RUNNING_COST_TOKENS = 16
"""A running request weighs as much as this many waiting prompt tokens when a pair is compared with a colocated worker."""


@dataclass(frozen=True, slots=True)
class Pair:
    """`prefill` None: `decode` computes the whole request."""

    prefill: str | None
    decode: str


@dataclass(frozen=True, slots=True)
class Need:
    """What is to be placed: tokens to compute, workers not to use, and where its siblings are (their prompt is cached).

    `keys` are those of the prompt's full blocks, empty unless the policy asks for them. `draw` is a number from 0 to
    2^64 − 1, for policies that leave something to chance. `output_tokens` may still be generated. `now` is the time.
    `may_wait`: a policy may say nobody although there is room; not of who has tokens out or has waited for long.
    """

    tokens: int
    avoid: frozenset[str] = frozenset()
    prefer: Pair | None = None
    keys: tuple[BlockKey, ...] = ()
    draw: int = 0
    slo: Slo = NO_LIMITS
    output_tokens: int = 0
    now: float = 0.0
    may_wait: bool = False


@dataclass(frozen=True, slots=True)
class Nobody:
    """`busy`: workers are connected but have no room, so waiting helps. `again_s`: after which it is of use to ask again though
    nothing else has happened. `yields`: others may have the place meanwhile."""

    reason: str
    busy: bool
    again_s: float = math.inf
    yields: bool = False


class Candidate(NamedTuple):
    """A placement that was looked at, and what was predicted of it.

    `ttft_s` from the decision to the first token: `overhead_s` of router and sessions, `queue_s` behind other prompts,
    `prefill_s` of its own, `held_s` until the second token is there (`router.pacing`). `gap_s` is comparable with a TBT limit,
    `tpot_s` with one of mean gaps; `transfer_s` is what the hand-off adds to the first gap.
    """

    pair: Pair
    ttft_s: float
    gap_s: float
    score: float
    reason: str = ""
    overhead_s: float = 0.0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    transfer_s: float = 0.0
    tpot_s: float = 0.0
    step_s: float = 0.0
    """A gap without what the hand-off adds."""
    standard_chunk_s: float = 0.0
    standard_gap_s: float = 0.0
    """What was believed of these two workers: see `router.calibration.Correction`."""
    held_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Decision:
    """`candidates`: the best ones first, from policies that predict. `reason`: why this place, for who asks later.
    `hold_until`: the first token may be kept until then (`router.pacing`)."""

    place: Pair | Nobody
    candidates: tuple[Candidate, ...] = ()
    reason: str = ""
    hold_until: float | None = None


class Policy(Protocol):
    @property
    def wants_keys(self) -> bool:
        """Whether it looks at `Need.keys`: they cost a microsecond per block."""
        ...

    def begins_s(self, situation: Situation, now: float) -> Sequence[float]:
        """In how many seconds each place begins with the next prompt: then requests wait in the order in which most keep their
        limits. Empty: in that of their limits alone."""
        ...

    def decide(self, situation: Situation, need: Need) -> Decision:
        """Names connected workers, none of `need.avoid`. Never raises, whatever workers report."""
        ...


class Scored:
    """The frame of every policy that scores workers: filters, then one column of scores per pool, then the smallest.

    A colocated worker takes the whole request when there is no pair, or when it is less loaded than the best one.
    """

    wants_keys = False

    def begins_s(self, situation: Situation, now: float) -> Sequence[float]:
        return ()

    def prefill_scores(self, situation: Situation, pool: Pool, need: Need) -> tuple[Column, ...]:
        """Scores and tie-breakers, lower is better."""
        return (pool.waiting_tokens,)

    def decode_scores(self, situation: Situation, pool: Pool, need: Need) -> tuple[Column, ...]:
        return (pool.running, -pool.room_blocks)

    def whole_scores(self, situation: Situation, pool: Pool, need: Need) -> tuple[Column, ...]:
        return (whole_cost(pool),)

    def decide(self, situation: Situation, need: Need) -> Decision:
        place = self._choose(situation, need)
        return Decision(place, reason=_why(place, need))

    def _choose(self, situation: Situation, need: Need) -> Pair | Nobody:
        prefill, decode, whole = situation.prefill, situation.decode, situation.whole
        may_prefill = prefill.allowed(need.avoid) & window_open(prefill, need.tokens)
        may_decode, may_whole = decode.allowed(need.avoid), whole.allowed(need.avoid)
        if need.prefer is not None and _available(need.prefer, situation, may_prefill, may_decode, may_whole):
            return need.prefer
        whole_row = _pick(self.whole_scores(situation, whole, need), may_whole) if may_whole.any() else None
        if may_prefill.any() and may_decode.any():
            p = _pick(self.prefill_scores(situation, prefill, need), may_prefill)
            d = _pick(self.decode_scores(situation, decode, need), may_decode)
            assert p is not None
            assert d is not None
            cost = prefill.waiting_tokens[p] + RUNNING_COST_TOKENS * decode.running[d]
            if whole_row is None or cost <= whole_cost(whole)[whole_row]:
                return Pair(prefill.names[p], decode.names[d])
        if whole_row is not None:
            return Pair(None, whole.names[whole_row])
        if prefill.allowed(need.avoid).any() and may_decode.any():
            return Nobody("every prefill worker has a full window of prompts", busy=True)
        return why_nobody(situation, need)


class LeastLoad(Scored):
    """Prefill with the fewest waiting tokens, decode with the fewest running requests (then the most free blocks)."""


def whole_cost(pool: Pool) -> Column:
    return pool.waiting_tokens + RUNNING_COST_TOKENS * pool.running


def window_open(pool: Pool, tokens: int) -> Mask:
    """Prefill workers that may be sent a prompt now. Alone, any prompt may go."""
    return np.asarray(pool.window_tokens <= PREFILL_WINDOW_TOKENS - tokens)


def why_nobody(situation: Situation, need: Need) -> Nobody:
    """For the user, when a pair and a colocated worker are both missing."""
    if len(situation.prefill) and len(situation.decode):
        return Nobody("the workers that are connected refused or failed a moment ago", busy=True)
    if len(situation.whole):
        return Nobody("the colocated workers refused or failed a moment ago", busy=True)
    pools = {WorkerRole.PREFILL: situation.prefill, WorkerRole.DECODE: situation.decode}
    missing = [role.value for role, pool in pools.items() if not pool.allowed(need.avoid).any()]
    return Nobody(f"no {' and no '.join(missing)} worker is connected", busy=False)


def _pick(scores: tuple[Column, ...], mask: Mask) -> int | None:
    first, *ties = scores
    return best(first, mask, *ties)


def _why(place: Pair | Nobody, need: Need) -> str:
    if isinstance(place, Nobody):
        return place.reason
    return "its other choices run there" if place == need.prefer else "the lowest score of those with room"


def _available(pair: Pair, situation: Situation, prefills: Mask, decodes: Mask, wholes: Mask) -> bool:
    if pair.prefill is None:
        return _has(situation.whole, wholes, pair.decode) or _has(situation.decode, decodes, pair.decode)
    return _has(situation.prefill, prefills, pair.prefill) and _has(situation.decode, decodes, pair.decode)


def _has(pool: Pool, mask: Mask, name: str) -> bool:
    row = pool.row.get(name)
    return row is not None and bool(mask[row])
