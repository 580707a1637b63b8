"""What waiting costs the router's event loop: one request's way through the queue with 10 to 100,000 others in it.

Claims
- A request's way through the queue (joining it, being found its head, leaving it) takes at most 0.1 ms with 10,000 waiting, in
  every order, whether they belong to one tenant or to a thousand, while what runs is charged to their counters.
- Ten thousand waiting cost at most 5 times what ten do; draining 10,000 without anybody joining is no slower.

One process, nothing but the queue: no worker, no socket.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

from benchmarks.rows import Row, arguments, report
from core.request import Slo
from router.fairness import VirtualCounters
from router.order import ORDERS, Waiting
from router.queue import WaitQueue

SIZES = (10, 1_000, 10_000, 100_000)
BAR_MS = 0.1
GROWTH_BAR = 5.0
CHARGES = 4
"""Messages of tokens per place given."""


def passages_s(order: str, waiting: int, tenants: int, passages: int) -> float:
    """Seconds of one passage: a place given, a request joining, counters charged in between."""
    rng = random.Random(1)
    counters = VirtualCounters()
    queue = WaitQueue(2 * waiting, ORDERS[order], counters, aging_s=1e9)

    def make(number: int) -> Waiting:
        limits = Slo(ttft_s=rng.uniform(0.5, 60.0))
        priority = rng.choice((-10, 0, 10))
        return Waiting(f"r{number}", f"t{rng.randrange(tenants)}", "", priority, number, number, limits, prefill_s=rng.random())

    for number in range(waiting):
        queue.add(make(number))
    coming = [make(waiting + number) for number in range(passages)]
    charged = [f"t{rng.randrange(tenants)}" for _ in range(CHARGES * passages)]
    begin = time.perf_counter()
    for number, one in enumerate(coming):
        queue.add(one)
        for tenant in charged[CHARGES * number : CHARGES * (number + 1)]:
            counters.charge_output(tenant, 8)
        head = queue.head(0.0)
        assert head is not None
        queue.taken(head, 0.0)
    took_s = time.perf_counter() - begin
    assert len(queue) == waiting
    return took_s / passages


def drained_s(order: str, waiting: int) -> float:
    """Seconds of one place given, until nobody waits any more."""
    queue = WaitQueue(waiting, ORDERS[order])
    for number in range(waiting):
        queue.add(Waiting(f"r{number}", arrived_at=number))
    begin = time.perf_counter()
    while (head := queue.head(0.0)) is not None:
        queue.taken(head, 0.0)
    return (time.perf_counter() - begin) / waiting


def measure(passages: int, rounds: int) -> Iterator[Row]:
    for order in sorted(ORDERS):
        for tenants in (1, 1000):
            best = {waiting: min(passages_s(order, waiting, tenants, passages) for _ in range(rounds)) for waiting in SIZES}
            whose = "one tenant" if tenants == 1 else f"{tenants:,} tenants"
            for waiting, took_s in best.items():
                bar = BAR_MS if waiting == 10_000 else None
                claim = f"{order}, {whose}: a passage with {waiting:,} waiting"
                yield Row(f"queue-{order}-{tenants}-{waiting}", claim, 1e3 * took_s, "ms", bar, "<=")
            growth = best[10_000] / best[10]
            claim = f"{order}, {whose}: 10,000 waiting over 10"
            yield Row(f"queue-{order}-{tenants}-growth", claim, growth, "x", GROWTH_BAR, "<=")
        took_s = min(drained_s(order, 10_000) for _ in range(rounds))
        yield Row(f"queue-{order}-drain", f"{order}: a place given while 10,000 are drained", 1e3 * took_s, "ms", BAR_MS, "<=")


if __name__ == "__main__":
    given = arguments(__doc__).parse_args()
    report(measure(2_000 if given.quick else 10_000, 3 if given.quick else 5), given.json)
