"""A closed loop of streaming completions over HTTP: the same client, prompts and counting for every server."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import httpx

TIMEOUT_S = 180.0
FIRST_TOKEN_ID, LAST_TOKEN_ID = 300, 4000  # plain tokens in every vocabulary used here


@dataclass(slots=True)
class Record:
    ttft_s: float
    gaps_s: list[float]
    total_s: float


@dataclass(slots=True)
class Outcome:
    """What one closed loop measured. Gaps are between chunks that carried text or a token."""

    wall_s: float
    tokens: int
    records: list[Record] = field(default_factory=list)

    @property
    def ttft_s(self) -> float:
        return median(record.ttft_s for record in self.records)

    @property
    def itl_s(self) -> float:
        return median(gap for record in self.records for gap in record.gaps_s)

    @property
    def tpot_s(self) -> float:
        return median(sum(record.gaps_s) / len(record.gaps_s) for record in self.records)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.wall_s


def together(outcomes: Sequence[Outcome]) -> Outcome:
    """Several turns of one server as one."""
    records = [record for outcome in outcomes for record in outcome.records]
    return Outcome(sum(o.wall_s for o in outcomes), sum(o.tokens for o in outcomes), records)


@dataclass(frozen=True, slots=True)
class Load:
    requests: int
    concurrency: int
    prompt_tokens: int
    output_tokens: int
    seed: int = 0

    def prompts(self) -> list[list[int]]:
        rng = random.Random(self.seed)
        return [[rng.randint(FIRST_TOKEN_ID, LAST_TOKEN_ID) for _ in range(self.prompt_tokens)] for _ in range(self.requests)]


Prepare = Callable[[httpx.AsyncClient, dict[str, Any], int], Awaitable[dict[str, Any]]]


async def run(url: str, load: Load, model: str, prepare: Prepare | None = None) -> Outcome:
    """Sends the load to `url`; `prepare` may do a first leg elsewhere and returns the body to stream (its time counts).

    Raises RuntimeError for an answer that is an error, and what httpx raises.
    """
    queue = list(enumerate(load.prompts()))
    records: list[Record] = []
    limits = httpx.Limits(max_connections=load.concurrency * 2)
    async with httpx.AsyncClient(timeout=TIMEOUT_S, limits=limits) as client:

        async def worker() -> None:
            while queue:
                index, prompt = queue.pop()
                records.append(await _stream(client, url, _body(model, prompt, load.output_tokens), index, prepare))

        started = time.perf_counter()
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(load.concurrency):
                    group.create_task(worker())
        except ExceptionGroup as failed:  # the first says why, the others follow from it
            raise failed.exceptions[0] from None
        wall_s = time.perf_counter() - started
    return Outcome(wall_s, load.requests * load.output_tokens, records)


def _body(model: str, prompt: list[int], output_tokens: int) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }


async def _stream(client: httpx.AsyncClient, url: str, body: dict[str, Any], index: int, prepare: Prepare | None) -> Record:
    started = time.perf_counter()
    if prepare is not None:
        body = await prepare(client, body, index)
    times: list[float] = []
    async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{url} answered {response.status_code}: {(await response.aread()).decode()[:500]}")
        async for line in response.aiter_lines():
            if line.startswith("data: {") and json.loads(line[6:]).get("choices"):
                times.append(time.perf_counter())  # noqa: PERF401  when it came, not when the stream ended
    if len(times) < 2:
        raise RuntimeError(f"{url} streamed {len(times)} tokens of {body['max_tokens']}")
    gaps = [after - before for before, after in itertools.pairwise(times)]
    return Record(times[0] - started, gaps, times[-1] - started)
