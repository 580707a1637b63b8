"""What it takes to place a request: the situation as it changes, the index of prefixes, the policy's choice."""

from __future__ import annotations

import random
from dataclasses import replace

from core.blocks import BlockKey
from core.request import FinishReason
from router.attempt import JourneySpec
from router.lengths import Lengths
from router.policy import Decision, Need, Policy
from router.prefix_index import PrefixIndex
from router.situation import Situation
from router.view import Claim, Claims, ClusterView

INDEX_BLOCKS_MAX = 1_000_000


class Placer:
    """Belongs to one dispatcher. `stale_after_s`: older reports are discounted. `draws`: for policies that draw lots.

    The index is fed by the router's own placements: whoever computes a prompt will have its blocks.
    """

    def __init__(self, policy: Policy, stale_after_s: float, draws: random.Random) -> None:
        self.claims = Claims()
        self.index = PrefixIndex(INDEX_BLOCKS_MAX)
        self._policy = policy
        self._stale_after_s = stale_after_s
        self._draws = draws
        self._lengths = Lengths()
        self._situation = self._see(ClusterView(), frozenset())

    def situation(self, view: ClusterView, connected: frozenset[str]) -> Situation:
        """What is known now: one object until the view or the sessions change."""
        known = self._situation
        if known.view is not view or known.connected != connected:
            known = self._situation = self._see(view, connected)
        return known

    def keys(self, situation: Situation, spec: JourneySpec) -> tuple[BlockKey, ...]:
        """Of the prompt's full blocks, for a policy that looks at them."""
        return situation.prompt_keys(spec.prompt, spec.cache_salt) if self._policy.wants_keys else ()

    def decide(self, situation: Situation, need: Need) -> Decision:
        return self._policy.decide(situation, replace(need, draw=self._draws.getrandbits(64)))

    def answer(self, spec: JourneySpec, so_far: int) -> int:
        """Tokens that its answer will probably still have."""
        assert spec.sampling.max_tokens is not None, "the front resolved it"
        return self._lengths.predict(_group(spec), spec.sampling.max_tokens, so_far).median - so_far

    def ended(self, spec: JourneySpec, tokens: int, reason: FinishReason | None) -> None:
        """A journey ended with so many tokens; what was cut short says nothing about lengths."""
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._lengths.ended(_group(spec), tokens)

    def moved(self, old: Claim, new: Claim) -> None:
        """A journey left `old` and occupies `new`."""
        self.claims.swap(old, new)
        self._situation.moved(old, new)

    def accepted(self, claim: Claim, keys: tuple[BlockKey, ...]) -> None:
        """A worker took the prompt with these keys."""
        where = claim.prefill or claim.decode
        if keys and where is not None:
            self.index.added(where, keys)

    def lost(self, worker: str) -> None:
        """Its session is over: it may have forgotten everything."""
        self.index.forget(worker)

    def _see(self, view: ClusterView, connected: frozenset[str]) -> Situation:
        return Situation(view, connected, self.claims, self.index, self._stale_after_s)


def _group(spec: JourneySpec) -> str:
    """Whose answers are alike: until tenants have names, those that share a cache."""
    return spec.cache_salt.hex()
