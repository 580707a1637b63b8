"""What it takes to place a request: the situation as it changes, the index of prefixes, the policy's choice, and its memory."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

from core.blocks import BlockKey
from core.errors import TandemError
from core.request import FinishReason
from router.attainment import CLASS_UNNAMED
from router.attempt import JourneySpec
from router.block_index import BlockIndex
from router.calibration import Calibration
from router.decisions import Decisions, Explanation, Outcome
from router.facts import Facts
from router.forecast_pair import forecast
from router.journey import Journey
from router.kv_events import KvEvents
from router.lengths import Lengths
from router.occupancy import Occupancy
from router.pacing import paced
from router.policies import name_of
from router.policy import Decision, Need, Pair, Policy
from router.prediction import PredictionErrors
from router.situation import Situation
from router.view import NOTHING, Claim, Claims, ClusterView, Held

log = logging.getLogger(__name__)

INDEX_BLOCKS_MAX = 1_000_000


class Placer:
    """Belongs to one dispatcher. `stale_after_s`: older reports are discounted. `draws`: for policies that draw lots.
    `fetches`: whether workers fetch blocks from each other (`store.fetch`). `holds`: whether first tokens may wait for the
    second (`router.hold_first_token`).

    The index is there for a policy that looks at it. It is fed by what nodes say of their blocks (`events`), and by the
    router's own placements until they do: whoever computes a prompt will have its blocks.
    """

    def __init__(
        self,
        policy: Policy,
        stale_after_s: float,
        draws: random.Random,
        index_blocks_max: int = INDEX_BLOCKS_MAX,
        fetches: bool = True,
        holds: bool = True,
    ) -> None:
        self.claims = Claims()
        self.index = BlockIndex(index_blocks_max) if policy.wants_keys and index_blocks_max else None
        self.events = KvEvents(self.index) if self.index is not None else None
        self.decisions = Decisions()
        self.errors = PredictionErrors()
        self.calibration = Calibration()
        self._occupancy = Occupancy()
        self._policy = policy
        self._policy_name = name_of(policy)
        self._stale_after_s = stale_after_s
        self._draws = draws
        self._fetches = fetches
        self._holds = holds
        self._lengths = Lengths()
        self._then: Mapping[str, Held] = {}
        self._reports: dict[str, tuple[int, int]] = {}
        self._situation = self._see(ClusterView(), frozenset(), 0.0)

    def situation(self, view: ClusterView, connected: frozenset[str], now: float) -> Situation:
        """What is known now: one object until the view or the sessions change, or a report becomes stale."""
        if self.index is not None:
            self.index.expire(now)
        known = self._situation
        same = known.connected is connected or known.connected == connected  # sets compare themselves name by name
        if known.view is not view or not same or now > self._stale_at:
            known = self._situation = self._see(view, connected, now)
        return known

    def keys(self, situation: Situation, spec: JourneySpec) -> tuple[BlockKey, ...]:
        """Of the prompt's full blocks, for a policy that looks at them."""
        return situation.prompt_keys(spec.prompt, spec.cache_salt) if self.index is not None else ()

    def need(
        self,
        journey: Journey,
        avoid: frozenset[str],
        prefer: Pair | None,
        keys: tuple[BlockKey, ...],
        now: float,
        its_turn: bool = False,
    ) -> Need:
        """What the journey asks for now. Of its TTFT limit, what is left; whoever has tokens out cannot miss it any more.
        A policy may make it wait, unless it is `its_turn` after having waited for long."""
        spec, so_far = journey.spec, len(journey.log)
        slo = spec.slo
        if slo.ttft_s is not None:
            left_s = None if so_far else max(slo.ttft_s - (now - journey.facts.arrived_at), 1e-3)
            slo = replace(slo, ttft_s=left_s)
        tokens = len(spec.prompt) + so_far
        may_wait = not its_turn and not so_far and prefer is None and spec.choice == 0
        return Need(tokens, avoid, prefer, keys, slo=slo, output_tokens=self.answer(spec, so_far), now=now, may_wait=may_wait)

    def decide(self, situation: Situation, need: Need, journey: Journey) -> Decision:
        """The policy's choice, kept with what is predicted of it: also where the policy itself predicts nothing."""
        need = replace(need, draw=self._draws.getrandbits(64))
        decision = self._policy.decide(situation, need)
        if isinstance(decision.place, Pair) and not decision.candidates:
            candidate = forecast(situation, need, decision.place)
            decision = replace(decision, candidates=(candidate,) if candidate is not None else ())
        if self._holds:
            decision = paced(need, decision)
        about = _about(journey.spec, self._policy_name, need)
        kept = self.decisions.decided(about, need.now - journey.facts.arrived_at, decision)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("request %s: %s", about.request_id, kept.last)
        return decision

    def answer(self, spec: JourneySpec, so_far: int) -> int:
        """Tokens that its answer will probably still have."""
        return self._lengths.predict(_group(spec), spec.max_tokens, so_far).median - so_far

    def ended(self, journey: Journey, reason: FinishReason | None, error: TandemError | None) -> None:
        """A journey is over; what was cut short says nothing about lengths."""
        tokens, facts = len(journey.log), journey.facts
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._lengths.ended(_group(journey.spec), tokens)
        finish, message = (error.code, error.message) if error is not None else (reason.value if reason else "", "")
        timing = facts.timing(facts.finished_at or facts.arrived_at)
        outcome = Outcome(finish, timing, tokens, facts.cached_tokens, facts.failovers, facts.placement, message)
        known = self.decisions.ended(journey.spec.request_id, outcome)
        if known is not None and error is None:
            self.errors.ended(known)
            if known.last.chosen is not None and not facts.failovers:
                self.calibration.observe(known.last.chosen, known.last.at_s, facts, self._standard_gaps(facts))

    def moved(self, old: Claim, new: Claim, now: float, facts: Facts | None = None) -> None:
        """The journey with these facts left `old` and occupies `new`."""
        self.claims.swap(old, new, now)
        self._situation.moved(old, new)
        for claim in (old, new) if old.decode != new.decode else (new,):
            if claim.decode is not None:
                self._occupancy.changed(claim.decode, now, self.claims.held(claim.decode))
        if facts is not None and new.decode is not None and new.prefill is None:
            facts.decoding_since = self._occupancy.mark(new.decode, now)

    def accepted(self, claim: Claim, keys: tuple[BlockKey, ...], now: float) -> None:
        """A worker took the prompt with these keys."""
        where = claim.prefill or claim.decode
        if keys and where is not None and self.index is not None:
            self.index.expect(where, keys, now)

    def begins_s(self, situation: Situation, now: float) -> Sequence[float]:
        """As the policy sees it."""
        return self._policy.begins_s(situation, now)

    def lost(self, worker: str) -> None:
        """Its session is over: it may have forgotten everything."""
        if self.events is not None:
            self.events.down(worker)

    def _standard_gaps(self, facts: Facts) -> float | None:
        """How many standard gaps one with all who decoded beside it is believed to take; None where that is not known."""
        begun = facts.decoding_since
        beside = self._occupancy.since(begun, facts.finished_at) if begun and facts.finished_at is not None else None
        if begun is None or beside is None:
            return None
        pools = (self._situation.decode, self._situation.whole)
        return next((pool.standard_gaps(pool.row[begun.worker], *beside) for pool in pools if begun.worker in pool.row), None)

    def _see(self, view: ClusterView, connected: frozenset[str], now: float) -> Situation:
        older_s = max(now - view.received_at, 0.0)
        self._stale_at = view.stale_at(self._stale_after_s, now)
        self._then = self._held_then(view)
        self._reports = {name: (worker.epoch, worker.sequence) for name, worker in view.workers.items()}
        return Situation(
            view,
            connected,
            self.claims,
            self.index,
            self._stale_after_s,
            view.received_at,
            self.calibration,
            older_s,
            self._then,
            self._fetches,
        )

    def _held_then(self, view: ClusterView) -> Mapping[str, Held]:
        """What we held when each worker's report came: a snapshot may bring one that was seen before, and what was claimed
        since is not in it."""
        held, seen = dict(self.claims.all_held()), self._reports
        for name, worker in view.workers.items():
            if worker.sequence and seen.get(name) == (worker.epoch, worker.sequence):
                held[name] = self._then.get(name, NOTHING)
        return held


def _about(spec: JourneySpec, policy: str, need: Need) -> Explanation:
    return Explanation(spec.request_id, policy, spec.slo_class or CLASS_UNNAMED, spec.slo, len(spec.prompt), need.output_tokens)


def _group(spec: JourneySpec) -> str:
    """Whose answers are alike."""
    return f"{spec.tenant}\0{spec.slo_class}"
