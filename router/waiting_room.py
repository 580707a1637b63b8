"""Everything between a request's arrival and its place: quota, room in the queue, turn, early refusal. Deciding code.

The dispatcher asks and carries out; `now` is its clock. What was served is charged to the tenant here, in tokens to its quota
and in weighted tokens to its virtual counter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from core.config import RouterConfig
from core.errors import OverloadedError, QuotaExceededError
from core.request import Slo
from router.attempt import JourneySpec
from router.early_rejection import (
    Departures,
    Hold,
    Refusal,
    first_token_limit_s,
    judge,
    quickest_s,
    relief_by_request_s,
)
from router.fairness import INPUT_WEIGHT, OUTPUT_WEIGHT, VirtualCounters
from router.heap import KeyedHeap
from router.order import ORDERS, Waiting
from router.policy import Candidate, Decision, Need, Nobody, Pair
from router.queue import Pace, WaitQueue, bounded_retry_s
from router.quotas import Quotas
from router.sharing import Service, Sharing
from router.situation import Situation

NEAR = 0.9
"""Part of somebody's token limit to which batch work may fill a worker."""


class WaitingRoom:
    """`sharing`: what other routers are to hear of, and said."""

    def __init__(self, config: RouterConfig, max_queue: int | None = None) -> None:
        self.counters = VirtualCounters({name: tenant.weight for name, tenant in config.tenants.items()})
        self.quotas = Quotas(config.tenants)
        self.sharing = Sharing()
        self.departures = Departures()
        self.queue = WaitQueue(
            config.max_queue if max_queue is None else max_queue,
            ORDERS[config.queue],
            self.counters,
            config.aging_s,
            {name: found.queue_share for name, found in config.classes.items()},
        )
        self._pace = Pace()
        self._rejects = config.admission == "reject"
        self._aging_s = config.aging_s
        self._limits = KeyedHeap()  # token limits of who is here or runs
        self._held: set[str] = set()  # who waits although there is a place

    # ---- at the door -----------------------------------------------------------------------------------------------

    def check(self, spec_tenant: str, slo_class: str, now: float) -> None:
        """Raises QuotaExceededError, or OverloadedError when a new request could not even wait."""
        wait_s = self.quotas.wait_s(spec_tenant, now)
        if wait_s > 0:
            rate = self.quotas.rate(spec_tenant)
            text = f"tenant {spec_tenant} has used up its quota of {rate:g} tokens/s (router.tenants); retry in {wait_s:.3g} s"
            raise QuotaExceededError(text, retry_after_s=wait_s)
        if len(self.queue):
            self.check_room(spec_tenant, slo_class, more=1)

    def check_room(self, tenant: str, slo_class: str, *, more: int) -> None:
        """Raises OverloadedError when there is no room for `more` than those who wait."""
        full = self.queue.full_for(tenant, slo_class, more)
        if full:
            raise OverloadedError(f"{full}; retry later", retry_after_s=self._pace.time_for(len(self.queue)))

    def entered(self, spec: JourneySpec) -> None:
        if spec.slo.tbt_s is not None:
            self._limits.set(spec.request_id, (spec.slo.tbt_s,))

    def left(self, spec: JourneySpec) -> None:
        """It is over, whatever became of it."""
        self._limits.discard(spec.request_id)
        self._held.discard(spec.request_id)
        self.departures.gone(spec.request_id)

    def retry_s(self) -> float:
        return self._pace.time_for(len(self.queue))

    # ---- waiting ---------------------------------------------------------------------------------------------------

    def wait(self, spec: JourneySpec, arrived_at: float, situation: Situation, need: Need, *, urgent: bool) -> Refusal | None:
        """It begins to wait, or is refused because its turn would come too late. Who waits already keeps its place."""
        self.departures.gone(spec.request_id)
        if urgent or spec.request_id in self.queue:
            self.queue.add(Waiting(spec.request_id), urgent=True)
            return None
        now, known = need.now, situation.costs_known
        prefill_s, decode_s = quickest_s(situation, need)
        give_up_at = math.inf
        if self._rejects and spec.choice == 0:
            give_up_at = arrived_at + first_token_limit_s(spec) - (prefill_s if known else 0.0)
            turn_s = self._pace.wait_s(self.queue.ahead_of(spec.tenant, spec.priority)) if known else 0.0
            late_s = now + turn_s - give_up_at
            if late_s > 0:
                text = f"its turn comes in about {turn_s:.3g} s, which is {late_s:.3g} s too late for its first token"
                return Refusal(text, bounded_retry_s(late_s))
        waiting = Waiting(
            spec.request_id, spec.tenant, spec.slo_class, spec.priority, now, arrived_at, spec.slo, spec.deadline_s,
            prefill_s, decode_s, give_up_at,
        )  # fmt: skip
        self.queue.add(waiting)
        return None

    def give_up_at(self, request_id: str) -> float:
        """When waiting longer is of no use; infinity for who waits whatever happens."""
        waiting = self.queue.waiting(request_id)
        return waiting.give_up_at if waiting is not None else math.inf

    def judge(
        self, spec: JourneySpec, arrived_at: float, decision: Decision, situation: Situation, now: float
    ) -> Refusal | Hold | None:
        """What to do with a new request that could have this place: None, take it."""
        pair = decision.place
        if isinstance(pair, Nobody) and pair.yields:
            self.queue.put_off(spec.request_id, now + pair.again_s)
        predicted = next((candidate for candidate in decision.candidates if candidate.pair == pair), None)
        if not isinstance(pair, Pair) or predicted is None or spec.choice or not situation.costs_known:
            return None
        by_request_s = relief_by_request_s(situation, pair)

        def relief_s(at: float) -> float:
            return by_request_s * self.departures.between(pair.decode, now, at)

        verdict: Refusal | Hold | None = None
        if spec.priority < 0 and spec.slo == Slo():
            verdict = self._fill_gaps(predicted, relief_s(now + predicted.ttft_s), now, now - arrived_at)
        elif self._rejects:
            verdict = judge(now, arrived_at, spec, predicted, relief_s)
        if isinstance(verdict, Hold):
            self._held.add(spec.request_id)
        return verdict

    def expect(self, spec: JourneySpec, decision: Decision, need: Need) -> None:
        """It goes to the place decided on, and will leave it again."""
        predicted = next((candidate for candidate in decision.candidates if candidate.pair == decision.place), None)
        if predicted is not None:
            ends_at = need.now + predicted.ttft_s + need.output_tokens * predicted.tpot_s
            if math.isfinite(ends_at):
                self.departures.expect(spec.request_id, predicted.pair.decode, ends_at)

    def _fill_gaps(self, predicted: Candidate, relief_s: float, now: float, waited_s: float) -> Hold | None:
        """Work without limits and below the others yields to their limits, until it has waited `aging_s`."""
        strictest = self._limits.first()
        if strictest is None or waited_s >= self._aging_s:
            return None
        limit_s = NEAR * strictest[1][0]
        if predicted.gap_s - relief_s <= limit_s:
            return None
        return Hold(f"it would push token gaps to {predicted.gap_s:.3g} s, others are held to {strictest[1][0]:g} s", now + 0.5)

    # ---- service ---------------------------------------------------------------------------------------------------

    def taken(self, spec: JourneySpec, now: float, *, again: bool) -> None:
        """A worker took it; `again`: it had been taken before, and its prompt charged."""
        if spec.request_id in self.queue:
            self.queue.taken(spec.request_id, now)
        elif not again:
            self.counters.arrive(spec.tenant)
            self.counters.leave(spec.tenant)
        self._held.discard(spec.request_id)
        next_one = self.queue.head(now)
        self._pace.accepted(now, others_wait=next_one is not None and next_one not in self._held)
        if not again and spec.choice == 0:
            self._charge(spec.tenant, INPUT_WEIGHT * len(spec.prompt), len(spec.prompt), now)

    def generated(self, tenant: str, tokens: int, now: float) -> None:
        self._charge(tenant, OUTPUT_WEIGHT * tokens, tokens, now)

    def interesting(self) -> list[str]:
        """Of whom it matters here what others serve: who waits, and who has a quota."""
        return [*self.quotas.tenants(), *self.counters.tenants_waiting()]

    def heard(self, elsewhere: Mapping[str, Service], now: float) -> None:
        """Other routers served this."""
        for tenant, service in elsewhere.items():
            self.counters.charge(tenant, service.weighted)
            self.quotas.used(tenant, service.tokens, now)

    def _charge(self, tenant: str, service: float, tokens: int, now: float) -> None:
        self.counters.charge(tenant, service)
        self.quotas.used(tenant, tokens, now)
        self.sharing.served(tenant, service, tokens)
