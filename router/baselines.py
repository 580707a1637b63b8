"""What other systems do, in the same frame, so that ours can be compared with it. Deciding code.

Constants are those of the systems named; where a system ranks single workers, its rule chooses the prefill worker (which is
where a prompt's cache matters) and least load the decode worker, unless it has a rule of its own for that.
"""

from __future__ import annotations

import numpy as np

from router.cost_columns import Column
from router.policy import Need, Scored
from router.pools import Pool
from router.situation import Situation

_WORD = 1 << 32


class Random(Scored):
    """Any worker, by the request's draw."""

    def prefill_scores(self, situation: Situation, pool: Pool, need: Need) -> tuple[Column, ...]:
        return (_rotated(len(pool), need.draw % _WORD),)

    def decode_scores(self, situation: Situation, pool: Pool, need: Need) -> tuple[Column, ...]:
        return (_rotated(len(pool), need.draw // _WORD),)

    def whole_scores(self, situation: Situation, pool: Pool, need: Need) -> tuple[Column, ...]:
        return (_rotated(len(pool), need.draw % _WORD),)


class RoundRobin(Scored):
    """One after another: the toy proxies of vLLM and LMCache."""

    def __init__(self) -> None:
        self._turn = 0

    def prefill_scores(self, situation: Situation, pool: Pool, need: Need) -> tuple[Column, ...]:
        self._turn += 1
        return (_rotated(len(pool), self._turn - 1),)

    def decode_scores(self, situation: Situation, pool: Pool, need: Need) -> tuple[Column, ...]:
        return (_rotated(len(pool), self._turn - 1),)

    def whole_scores(self, situation: Situation, pool: Pool, need: Need) -> tuple[Column, ...]:
        self._turn += 1
        return (_rotated(len(pool), self._turn - 1),)


class PowerOfTwo(Scored):
    """The less loaded of two drawn workers (Mitzenmacher 2001; Ray Serve's default)."""

    def prefill_scores(self, situation: Situation, pool: Pool, need: Need) -> tuple[Column, ...]:
        return (_two_of(pool.waiting_tokens, need.draw % _WORD),)

    def decode_scores(self, situation: Situation, pool: Pool, need: Need) -> tuple[Column, ...]:
        return (_two_of(pool.running, need.draw // _WORD),)


class PrefixAware(Scored):
    """SGLang's gateway (`cache_aware`): the longest prefix, unless it is short or the pool is out of balance."""

    wants_keys = True
    SPREAD_MIN, SPREAD_RATIO, MATCH_MIN = 64, 1.5, 0.3

    def prefill_scores(self, situation: Situation, pool: Pool, need: Need) -> tuple[Column, ...]:
        load = pool.prefills + pool.running
        unbalanced = load.max() - load.min() > self.SPREAD_MIN and load.max() > self.SPREAD_RATIO * load.min()
        matched = matched_tokens(situation, pool, need)
        if unbalanced or matched.max() <= self.MATCH_MIN * need.tokens:
            return (pool.waiting_tokens,)
        return (-matched, pool.waiting_tokens)


class KvCost(Scored):
    """Dynamo's KV router: blocks to compute plus blocks being decoded, cached ones credited in full on the prefill side."""

    wants_keys = True

    def prefill_scores(self, situation: Situation, pool: Pool, need: Need) -> tuple[Column, ...]:
        uncached = np.maximum(pool.waiting_tokens + need.tokens - matched_tokens(situation, pool, need), 0.0)
        return (uncached / pool.block_tokens + (pool.blocks - pool.room_blocks),)

    def decode_scores(self, situation: Situation, pool: Pool, need: Need) -> tuple[Column, ...]:
        return (pool.context / pool.block_tokens, pool.running)


class Conductor(Scored):
    """Mooncake's Conductor (FAST '25, algorithm 1): least predicted TTFT, with its own prefix or with the best one fetched."""

    wants_keys = True
    BALANCE_RATIO = 1.5  # the paper gives none: "hand-tuned"

    def prefill_scores(self, situation: Situation, pool: Pool, need: Need) -> tuple[Column, ...]:
        own = matched_tokens(situation, pool, need)
        longest = own.max() if own.size else 0.0
        fetches = longest > self.BALANCE_RATIO * own if situation.fetches else np.zeros(len(pool), dtype=np.bool_)
        link = situation.view.link
        fetch_s = link.latency_s + (longest - own) * situation.token_bytes / link.bytes_per_s
        alone = pool.prefill_s(need.tokens - own, own)
        helped = fetch_s + pool.prefill_s(need.tokens - longest, longest)
        return (pool.queue_s() + np.where(fetches, np.minimum(alone, helped), alone), pool.waiting_tokens)

    def decode_scores(self, situation: Situation, pool: Pool, need: Need) -> tuple[Column, ...]:
        return (pool.gap_s(1.0, need.tokens), pool.running)


class Splitwise(Scored):
    """Splitwise's cluster scheduler (section 4.2): the shortest queue in pending tokens, then the least reserved memory."""

    def decode_scores(self, situation: Situation, pool: Pool, need: Need) -> tuple[Column, ...]:
        return (pool.blocks - pool.room_blocks, pool.running)


def matched_tokens(situation: Situation, pool: Pool, need: Need) -> Column:
    """Prompt tokens that each worker has cached, as far as the index knows; at least one is always computed."""
    return np.minimum(situation.cached_blocks(pool, need.keys) * pool.block_tokens, np.float64(max(need.tokens - 1, 0)))


def _rotated(count: int, start: int) -> Column:
    """0 for the worker whose turn it is, more for each one after it."""
    return (np.arange(count, dtype=np.float64) - start % max(count, 1)) % max(count, 1)


def _two_of(load: Column, draw: int) -> Column:
    """The load of two different workers, infinity for the others."""
    count = load.size
    if count <= 2:
        return load
    one = draw % count
    other = (one + 1 + (draw // count) % (count - 1)) % count
    scores = np.full(count, np.inf)
    scores[[one, other]] = load[[one, other]]
    return scores
