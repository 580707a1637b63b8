"""Which workers take a request. Deciding code; the machine around it stays when the policy is replaced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from core.errors import ConfigError
from core.request import WorkerRole
from router.view import Situation, WorkerView

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
    """What is to be placed: tokens to compute, workers not to use, and where its siblings are (their prompt is cached)."""

    tokens: int
    avoid: frozenset[str] = frozenset()
    prefer: Pair | None = None


@dataclass(frozen=True, slots=True)
class Nobody:
    """`busy`: workers are connected but have no room, so waiting helps."""

    reason: str
    busy: bool


class Policy(Protocol):
    def choose(self, situation: Situation, need: Need) -> Pair | Nobody:
        """Names connected workers, none of `need.avoid`. The same situation gives the same answer."""
        ...


class LeastLoad:
    """Prefill with the fewest waiting tokens, decode with the fewest running requests (then the most free blocks).

    A colocated worker takes the whole request when there is no pair or when it is less loaded than the best one.
    """

    def choose(self, situation: Situation, need: Need) -> Pair | Nobody:
        prefills = situation.candidates(WorkerRole.PREFILL, need.avoid)
        decodes = situation.candidates(WorkerRole.DECODE, need.avoid)
        wholes = situation.candidates(WorkerRole.COLOCATED, need.avoid)
        open_prefills = [w for w in prefills if _window_open(situation, w, need.tokens)]
        if need.prefer is not None and _available(need.prefer, open_prefills, decodes, wholes):
            return need.prefer
        whole = min(wholes, key=lambda w: _whole_cost(situation, w), default=None)
        if open_prefills and decodes:
            prefill = min(open_prefills, key=lambda w: _waiting_tokens(situation, w))
            decode = min(decodes, key=lambda w: (_running(situation, w), -_room(w)))
            cost = _waiting_tokens(situation, prefill) + RUNNING_COST_TOKENS * _running(situation, decode)
            if whole is None or cost <= _whole_cost(situation, whole):
                return Pair(prefill.worker_id, decode.worker_id)
        if whole is not None:
            return Pair(None, whole.worker_id)
        if prefills and decodes:
            return Nobody("every prefill worker has a full window of prompts", busy=True)
        return _why_nobody(situation, need, prefills, decodes)


POLICIES: dict[str, Callable[[], Policy]] = {"least_load": LeastLoad}


def make_policy(name: str) -> Policy:
    """Raises ConfigError naming the policies there are."""
    if name not in POLICIES:
        raise ConfigError(f"router.policy {name!r} is not known; choose one of {', '.join(sorted(POLICIES))}")
    return POLICIES[name]()


def _waiting_tokens(situation: Situation, worker: WorkerView) -> int:
    """The report covers all routers but is old; our claims are exact but only ours."""
    return max(worker.waiting_tokens, situation.claims.prefill_tokens(worker.worker_id))


def _running(situation: Situation, worker: WorkerView) -> int:
    return max(worker.running + worker.waiting, situation.claims.running(worker.worker_id))


def _whole_cost(situation: Situation, worker: WorkerView) -> int:
    return _waiting_tokens(situation, worker) + RUNNING_COST_TOKENS * _running(situation, worker)


def _room(worker: WorkerView) -> int:
    return worker.blocks_free + worker.blocks_cached


def _window_open(situation: Situation, worker: WorkerView, tokens: int) -> bool:
    claims = situation.claims
    if claims.prefills(worker.worker_id) == 0:
        return True
    return claims.prefill_tokens(worker.worker_id) + tokens <= PREFILL_WINDOW_TOKENS


def _available(pair: Pair, prefills: list[WorkerView], decodes: list[WorkerView], wholes: list[WorkerView]) -> bool:
    if pair.prefill is None:
        return any(w.worker_id == pair.decode for w in (*wholes, *decodes))
    return any(w.worker_id == pair.prefill for w in prefills) and any(w.worker_id == pair.decode for w in decodes)


def _why_nobody(situation: Situation, need: Need, prefills: list[WorkerView], decodes: list[WorkerView]) -> Nobody:
    if situation.candidates(WorkerRole.PREFILL, frozenset()) and situation.candidates(WorkerRole.DECODE, frozenset()):
        return Nobody("the workers that are connected refused or failed a moment ago", busy=True)
    if situation.candidates(WorkerRole.COLOCATED, frozenset()):
        return Nobody("the colocated workers refused or failed a moment ago", busy=True)
    missing = [name for name, found in (("prefill", prefills), ("decode", decodes)) if not found]
    return Nobody(f"no {' and no '.join(missing)} worker is connected", busy=False)
