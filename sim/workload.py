"""What a workload is: arrivals in the order of their time, whoever reads or makes them; and what can be done to any of them.

Every function here takes a stream and gives one, keeps the order of time and holds no more than it must.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request, before anybody has seen it.

    `arrival_s`: seconds since the workload began. `input_tokens` and `output_tokens`: what it asks and what it is told, 1 or
    more each. `blocks`: names of the prompt's consecutive blocks of `block_tokens` tokens each (the last may be partial), empty
    where nothing is known of its content; two prompts share a prefix exactly as far as their leading names agree. A session
    is a conversation, "" for a request of its own. `tenant` and `slo_class`: "" for the default ones.
    """

    arrival_s: float
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    block_tokens: int = 0
    session: str = ""
    tenant: str = ""
    slo_class: str = ""


def at_times(arrivals: Iterable[Arrival], times_s: Iterable[float]) -> Iterator[Arrival]:
    """The same requests at other times, as long as there are both."""
    for a, at in zip(arrivals, times_s, strict=False):
        yield Arrival(at, a.input_tokens, a.output_tokens, a.blocks, a.block_tokens, a.session, a.tenant, a.slo_class)


def rescaled(arrivals: Iterable[Arrival], factor: float) -> Iterator[Arrival]:
    """`factor` times the rate, by running the clock faster: every gap is divided by it.

    Order, CV of the gaps, counts per so many requests and so what a cache sees stay exactly as they were, which is why this is
    the way to scale a trace, and how Splitwise, DistServe and Mooncake do. Bursts and pauses within a session get shorter in
    seconds, by the same factor; where they matter more, `sim.workload_sessions.superposed` takes more sessions instead.
    """
    if not 0 < factor < math.inf:
        raise ValueError(f"a rate is scaled by a number above 0, not by {factor}")
    for a in arrivals:
        at = a.arrival_s / factor
        yield Arrival(at, a.input_tokens, a.output_tokens, a.blocks, a.block_tokens, a.session, a.tenant, a.slo_class)


def resized(
    arrivals: Iterable[Arrival], scale: float, input_max: float = math.inf, output_max: float = math.inf
) -> Iterator[Arrival]:
    """Lengths times `scale`, which end at the maxima, and blocks with them: for a model that holds less. Never below one."""
    for a in arrivals:
        asked = max(1, math.floor(min(a.input_tokens * scale, input_max)))
        told = max(1, math.floor(min(a.output_tokens * scale, output_max)))
        yield _cut(a, asked, told, math.ceil(a.block_tokens * scale))


def within_context(arrivals: Iterable[Arrival], context_max: int) -> Iterator[Arrival]:
    """Cut to what a model of that context holds: the answer to half of it, then the prompt to what is left, but one token."""
    for a in arrivals:
        told = min(a.output_tokens, max(1, context_max // 2))
        asked = min(a.input_tokens, max(1, context_max - told - 1))
        yield a if (asked, told) == (a.input_tokens, a.output_tokens) else _cut(a, asked, told, a.block_tokens)


def _cut(a: Arrival, asked: int, told: int, block_tokens: int) -> Arrival:
    blocks = a.blocks[: -(-asked // block_tokens)] if a.blocks else ()
    return Arrival(a.arrival_s, asked, told, blocks, block_tokens, a.session, a.tenant, a.slo_class)


def labelled(arrivals: Iterable[Arrival], tenant: str, slo_class: str = "") -> Iterator[Arrival]:
    """All of one tenant and class."""
    for a in arrivals:
        yield Arrival(a.arrival_s, a.input_tokens, a.output_tokens, a.blocks, a.block_tokens, a.session, tenant, slo_class)


def merged(*streams: Iterable[Arrival]) -> Iterator[Arrival]:
    """Several workloads at once, say of several tenants; of arrivals at the same time those of the first stream come first.

    Names of blocks and sessions are taken as they are: streams that must share nothing need names of their own.
    """
    return heapq.merge(*streams, key=attrgetter("arrival_s"))
