"""Offers load: sends each request when it is due, whatever became of those before. Latency counts from when it was due."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol, TypeVar

from core.latency import Outcome, RequestTrace
from sim.trace_formats import HASH_BLOCK_TOKENS
from tandem.errors import OverloadedError, TandemError

OUTSTANDING_MAX = 10_000
Word = TypeVar("Word")


@dataclass(frozen=True, slots=True)
class Job:
    """One request to send, `due_s` after the start of the run."""

    due_s: float
    prompt_tokens: int
    max_tokens: int
    seed: int
    prefix_ids: tuple[int, ...] = ()
    """Names of the prompt's leading blocks: equal names in front mean an equal prefix."""
    prefix_block: int = HASH_BLOCK_TOKENS
    """Tokens of each of them."""


def prompt_of(job: Job, words: Sequence[Word]) -> list[Word]:
    """Random ones of `words` (token ids, say), the same for the same job, with the prefixes shared that `prefix_ids` share."""
    prompt: list[Word] = []
    for name in job.prefix_ids:
        prompt += random.Random(name).choices(words, k=min(job.prefix_block, job.prompt_tokens - len(prompt)))
    return prompt + random.Random(job.seed).choices(words, k=job.prompt_tokens - len(prompt))


class Target(Protocol):
    """Something that answers requests."""

    @property
    def context_max(self) -> int | None:
        """Tokens that a request may have, answer included; None when it did not say."""
        ...

    def answer(self, job: Job) -> AsyncIterator[int]:
        """Yields how many tokens just arrived, as they do. Raises TandemError."""
        ...


OpenTarget = Callable[[], AbstractAsyncContextManager[Target]]


async def run_open(target: Target, jobs: list[Job], on_done: Callable[[RequestTrace], None]) -> list[RequestTrace]:
    """Sends each job when it is due, however slow the answers are. Beyond OUTSTANDING_MAX it counts as failed."""
    start = time.monotonic()
    tasks: list[asyncio.Task[RequestTrace]] = []
    running = 0
    traces: list[RequestTrace] = []

    async def one(job: Job) -> RequestTrace:
        nonlocal running
        running += 1
        try:
            trace = await send(target, job, start + job.due_s)
        finally:
            running -= 1
        on_done(trace)
        return trace

    async with asyncio.TaskGroup() as group:
        for number, job in enumerate(jobs):
            await asyncio.sleep(max(0.0, start + job.due_s - time.monotonic()))
            if running >= OUTSTANDING_MAX:
                due = start + job.due_s
                traces.append(RequestTrace(due, due, Outcome.FAILED, error="too many requests outstanding at the client"))
                on_done(traces[-1])
            else:
                tasks.append(group.create_task(one(job), name=f"request {number}"))
    return traces + [task.result() for task in tasks]


async def run_closed(
    target: Target, jobs: Iterator[Job], concurrency: int, until_s: float, on_done: Callable[[RequestTrace], None]
) -> list[RequestTrace]:
    """`concurrency` clients, each sending its next request when its last is answered, until `jobs` end or `until_s`."""
    start = time.monotonic()
    traces: list[RequestTrace] = []

    async def client() -> None:
        for job in jobs:
            if time.monotonic() - start >= until_s:
                return
            trace = await send(target, job, time.monotonic())
            traces.append(trace)
            on_done(trace)

    async with asyncio.TaskGroup() as group:
        for number in range(concurrency):
            group.create_task(client(), name=f"client {number}")
    return traces


async def send(target: Target, job: Job, due: float) -> RequestTrace:
    """One request from due to done. Only TandemErrors are outcomes; anything else is our mistake and raised."""
    token_s: list[float] = []
    outcome, reason = Outcome.COMPLETED, ""
    try:
        async for count in target.answer(job):
            token_s += [time.monotonic()] * count
        if not token_s:
            outcome, reason = Outcome.FAILED, "the answer held no token"
    except OverloadedError as error:
        outcome, reason = Outcome.REJECTED, error.message
    except TandemError as error:
        outcome, reason = Outcome.FAILED, error.message
    return RequestTrace(due, time.monotonic(), outcome, tuple(token_s), reason)
