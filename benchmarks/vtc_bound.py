"""VTC's bound on unfairness, through the shipped wait queue and counters (`router/queue.py`, `router/fairness.py`).

Sheng et al. (OSDI 2024): with service = prompt tokens + 2 · generated tokens, two clients that always have requests waiting
are served within 2U of each other, U = max(longest prompt, 2 · tokens in the running batch) (theorem 4.4); first come, first
served lets the difference grow with time. Their overload: clients at 1.5 and 3 requests a second, 256 tokens in and out, a KV
pool of 10,000 tokens, Llama-2-7B on one A10G; so U = 20,000. How fast that machine is they publish as about 780 tokens a
second; a step here takes 22 ms, 0.3 ms per prompt token and 1.1 ms per running request, which comes to the same.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from router.fairness import INPUT_WEIGHT, OUTPUT_WEIGHT, VirtualCounters
from router.order import Waiting
from router.queue import WaitQueue

POOL_TOKENS = 10_000
INPUT_TOKENS = OUTPUT_TOKENS = 256
RATES = {"slow": 1.5, "fast": 3.0}
BOUND = 2 * max(INPUT_WEIGHT * INPUT_TOKENS, OUTPUT_WEIGHT * POOL_TOKENS)
STEP_S, PROMPT_TOKEN_S, ROW_S = 0.022, 0.3e-3, 1.1e-3
ONE_LINE = "everybody"


@dataclass(frozen=True, slots=True)
class Played:
    """`gaps`: |service of one client − of the other| at the end of each step at which both had requests waiting.
    `counters`: largest difference of the counters at these steps, 0 where there are none (first come)."""

    gaps: list[float]
    counters: float
    tokens_per_s: float

    @property
    def growth(self) -> float:
        """The gap at the end over the gap half-way: about 2 where it grows with time."""
        return self.gaps[-1] / max(self.gaps[len(self.gaps) // 2], 1.0)


def play(fair: bool, seconds: float, seed: int) -> Played:
    """The overload for so long. `fair`: clients are tenants of the queue; otherwise they stand in one line."""
    arrivals = _arrivals(seconds, random.Random(seed))
    counters = VirtualCounters()
    queue = WaitQueue(10**9, counters=counters)
    waiting: dict[str, int] = dict.fromkeys(RATES, 0)
    served: dict[str, float] = dict.fromkeys(RATES, 0.0)
    running: list[list[object]] = []
    gaps: list[float] = []
    apart, now, tokens = 0.0, 0.0, 0
    coming = next(arrivals, None)
    while now < seconds:
        while coming is not None and coming[0] <= now:
            queue.add(Waiting(f"{coming[1]} {coming[0]}", tenant=coming[1] if fair else ONE_LINE))
            waiting[coming[1]] += 1
            coming = next(arrivals, None)
        prompts = 0
        while (head := queue.head(now)) is not None and (len(running) + 1) * (INPUT_TOKENS + OUTPUT_TOKENS) <= POOL_TOKENS:
            client = head.split()[0]
            queue.taken(head, now)
            counters.charge_input(client if fair else ONE_LINE, INPUT_TOKENS)
            waiting[client] -= 1
            served[client] += INPUT_WEIGHT * INPUT_TOKENS
            running.append([client, OUTPUT_TOKENS])
            prompts += INPUT_TOKENS
        for row in running:
            client, left = str(row[0]), row[1]
            assert isinstance(left, int)
            counters.charge_output(client if fair else ONE_LINE, 1)
            served[client] += OUTPUT_WEIGHT
            row[1] = left - 1
        now += STEP_S + PROMPT_TOKEN_S * prompts + ROW_S * len(running)
        tokens += prompts + len(running)
        running = [row for row in running if row[1]]
        if all(waiting.values()):
            gaps.append(abs(served["slow"] - served["fast"]))
            apart = max(apart, abs(counters.counter("slow") - counters.counter("fast"))) if fair else 0.0
    return Played(gaps, apart, tokens / now)


def _arrivals(seconds: float, rng: random.Random) -> Iterator[tuple[float, str]]:
    times = []
    for client, rate in RATES.items():
        at = rng.expovariate(rate)
        while at < seconds:
            times.append((at, client))
            at += rng.expovariate(rate)
    return iter(sorted(times))
