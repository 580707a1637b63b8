"""Conversations: made of turns with growing prompts, found in a trace by what prompts share, kept whole when a rate changes.

A session's requests belong together: the second turn finds the first one's cache. So thinning a workload request by request
would lower the hit ratio with the rate, and copying requests would invent hits; whole sessions are dropped or copied instead.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b

from sim.trace_formats import HASH_BLOCK_TOKENS, TOKENS_MAX
from sim.workload import Arrival
from sim.workload_lengths import Lengths

BLOCKS_PER_SESSION_MAX = 1 << 24
_SYSTEMS = 1 << 62  # names of blocks of system prompts begin here


@dataclass(frozen=True, slots=True)
class Chat:
    """Sessions of several turns. Turn k's prompt is turn k - 1's prompt and answer, and what the user adds.

    `turn`: tokens that a user adds and is told. `turns_mean`: of a geometric distribution, 1 or more. `pause_s`: mean of the
    exponential time from one turn's arrival to the next one's, answer included, for nobody knows yet how long that takes.
    All prompts begin with one of `systems` texts of `system_tokens`. A session ends before its tokens, the last answer
    included, pass `context_max`; its first turn is there in any case.
    """

    turn: Lengths
    turns_mean: float = 4.0
    pause_s: float = 30.0
    system_tokens: int = 0
    systems: int = 1
    context_max: int = 131_072
    block_tokens: int = HASH_BLOCK_TOKENS

    def arrivals(self, starts_s: Iterable[float], rng: random.Random, name: str = "chat") -> Iterator[Arrival]:
        """A session, called `name-0`, `name-1`, …, begins at each of these times, which never go back.

        Holds only the sessions that go on. Chats whose blocks are to be merged share block names: see `sim.workload.merged`.
        """
        going: list[tuple[float, int, Arrival, Iterator[Arrival]]] = []
        for number, start_s in enumerate(starts_s):
            yield from _due(going, start_s)
            turns = self._session(number, start_s, f"{name}-{number}", random.Random(rng.getrandbits(64)))
            first = next(turns)
            heapq.heappush(going, (start_s, number, first, turns))
        yield from _due(going, math.inf)

    def _session(self, number: int, start_s: float, session: str, rng: random.Random) -> Iterator[Arrival]:
        system = [_SYSTEMS + rng.randrange(self.systems) * BLOCKS_PER_SESSION_MAX]
        shared = self.system_tokens // self.block_tokens
        own = number * BLOCKS_PER_SESSION_MAX
        history, at_s, turn = self.system_tokens, start_s, 0
        while True:
            asked, told = self.turn.draw(rng)
            prompt = history + asked
            if turn and prompt + told > self.context_max:
                return
            full = prompt // self.block_tokens
            names = [system[0] + n if n < shared else own + n for n in range(full)]
            if prompt % self.block_tokens:
                names.append(-1 - own - turn)  # the next turn's block in this place holds more, and so has another name
            yield Arrival(at_s, prompt, told, tuple(names), self.block_tokens, session)
            if rng.random() * self.turns_mean < 1:
                return
            history, turn = prompt + told, turn + 1
            at_s += rng.expovariate(1 / self.pause_s)


def _due(going: list[tuple[float, int, Arrival, Iterator[Arrival]]], now_s: float) -> Iterator[Arrival]:
    """Takes every turn out of the heap that comes before `now_s`, and puts the session's next one in."""
    while going and going[0][0] <= now_s:
        _, number, arrival, turns = going[0]
        yield arrival
        after = next(turns, None)
        if after is None:
            heapq.heappop(going)
        else:
            heapq.heapreplace(going, (after.arrival_s, number, after, turns))


def with_sessions(arrivals: Iterable[Arrival]) -> Iterator[Arrival]:
    """Names the sessions of a trace that has block names and none of sessions, as Mooncake's.

    A request goes on with the session of the latest request whose whole prompt, its partial last block apart, its own begins
    with, and which is two blocks long at least: one block is a system prompt that strangers share. Anything else begins a
    session of its own. Holds one block name per session and length.
    """
    tails: dict[int, str] = {}
    begun = 0
    for a in arrivals:
        if a.session or not a.blocks:
            yield a
            continue
        full = a.blocks[: a.input_tokens // a.block_tokens]
        session = next((tails[block] for block in reversed(full[1:]) if block in tails), "")
        if not session:
            begun += 1
            session = f"s{begun}"
        if len(full) > 1:
            tails[full[-1]] = session
        yield Arrival(a.arrival_s, a.input_tokens, a.output_tokens, a.blocks, a.block_tokens, session, a.tenant, a.slo_class)


def with_histories(arrivals: Iterable[Arrival]) -> Iterator[Arrival]:
    """Names blocks for the turns of sessions where a trace names none: a turn's prompt begins with the whole prompt of the turn
    before it, as in a chat that sends its history along. A turn that is shorter begins a new history.

    One name stands for all of a prompt, so that two turns share as many tokens as the shorter one has. Holds a number per
    session.
    """
    last: dict[tuple[str, str], tuple[int, int]] = {}
    for a in arrivals:
        if not a.session or a.blocks:
            yield a
            continue
        who = a.tenant, a.session
        tokens, begun = last.get(who, (0, 0))
        begun += a.input_tokens < tokens
        last[who] = a.input_tokens, begun
        digest = blake2b(f"{a.tenant}\0{a.session}\0{begun}".encode(), digest_size=7).digest()
        name = int.from_bytes(digest, "little")
        yield Arrival(a.arrival_s, a.input_tokens, a.output_tokens, (name,), TOKENS_MAX, a.session, a.tenant, a.slo_class)


def superposed(arrivals: Iterable[Arrival], factor: float, rng: random.Random, jitter_s: float = 1.0) -> Iterator[Arrival]:
    """`factor` times as many sessions, at their own pace: below 1 some are dropped, above 1 there are copies.

    Requests without a session are sessions of one. A session is kept or dropped whole, whatever its length, by the random
    draw and its name alone. A copy shares no block and no session name with another, and is late by a part of
    `jitter_s`, the same for all its requests: pauses within a session stay as they are, and so do bursts that last longer.

    Against `sim.workload.rescaled`: that keeps gaps and order, this keeps seconds. Many independent copies drown what bursts
    are shorter than `jitter_s`, and a thinned trace tends to a Poisson process, for that is what superposing and thinning do.
    Holds the copies of the last `jitter_s` alone.
    """
    if not 0 < factor < math.inf:
        raise ValueError(f"a rate is scaled by a number above 0, not by {factor}")
    copies = math.ceil(factor)
    salt = rng.getrandbits(64).to_bytes(8, "little")
    held: list[tuple[float, int, Arrival]] = []
    order = 0
    for number, a in enumerate(arrivals):
        while held and held[0][0] <= a.arrival_s:
            yield heapq.heappop(held)[2]
        who = f"{a.tenant}\0{a.session}" if a.session else f"\0\0{number}"
        for copy in range(copies):
            kept, late = _fate(salt, who, copy)
            if kept < factor - copy:
                order += 1
                made = _copy(a, copy, copies, late * jitter_s if copies > 1 else 0.0)
                heapq.heappush(held, (made.arrival_s, order, made))
    while held:
        yield heapq.heappop(held)[2]


def _fate(salt: bytes, who: str, copy: int) -> tuple[float, float]:
    """Two even draws from 0 to 1 for a session's copy, which need no memory of it."""
    drawn = blake2b(f"{copy}\0{who}".encode(), digest_size=16, key=salt).digest()
    return int.from_bytes(drawn[:8], "little") / 2**64, int.from_bytes(drawn[8:], "little") / 2**64


def _copy(a: Arrival, copy: int, copies: int, late_s: float) -> Arrival:
    blocks = tuple(block * copies + copy for block in a.blocks) if copies > 1 else a.blocks
    session = f"{a.session}#{copy}" if a.session and copy else a.session
    at_s = a.arrival_s + late_s
    return Arrival(at_s, a.input_tokens, a.output_tokens, blocks, a.block_tokens, session, a.tenant, a.slo_class)
