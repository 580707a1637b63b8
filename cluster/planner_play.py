"""Plays requests through one replica: DistServe's simulator (section 4.1), step by step. Deciding code.

The planner of DistServe asks it thousands of times, so it knows only what that planner needs: whole prompts batched in
order of arrival, continuous batching of decode, pipelines whose stages hand batches on. `sim/` is the product on a virtual
clock. Where the paper leaves room the released code decides: it bounds a prompt batch by the KV capacity alone and moves KV
in no time. Its decode knows no memory, only 50,000 tokens of context a step. `Decode.BOUNDED` adds what the real engine has
to do: a request joins the batch when all it will hold fits.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

from cluster.planner_model import Arriving, Layout, PerformanceModel

DECODE_CONTEXT_MAX = 50_000


class Decode(Enum):
    """Who may join the running batch: `RELEASED` whoever comes, as in the released simulator; `BOUNDED` who has memory."""

    RELEASED = "released"
    BOUNDED = "bounded"


class Timing(NamedTuple):
    """`tpot_s`: from the first token to the last over the tokens that were decoded, 0 for none."""

    ttft_s: float
    tpot_s: float


def play_prefill(requests: Sequence[Arriving], model: PerformanceModel, layout: Layout) -> list[float]:
    """When each prompt is done, on the clock of the arrivals (which must not decrease)."""
    done = [0.0] * len(requests)
    free = [0.0] * layout.pp
    tokens_max = model.kv_tokens(layout)
    first = 0
    while first < len(requests):
        start = max(free[0], requests[first].arrival_s)
        tokens = squares = 0
        end = first
        while end < len(requests) and requests[end].arrival_s <= start:
            length = requests[end].input_tokens
            if end > first and tokens + length > tokens_max:
                break
            tokens, squares, end = tokens + length, squares + length * length, end + 1
        step_s = model.prefill_s(tokens, squares, layout)
        at = start + model.overhead_s(tokens) + step_s
        free[0] = at
        for stage in range(1, layout.pp):
            at = free[stage] = max(at, free[stage]) + step_s
        done[first:end] = [at] * (end - first)
        first = end
    return done


def play_decode(
    ready_s: Sequence[float],
    requests: Sequence[Arriving],
    model: PerformanceModel,
    layout: Layout,
    how: Decode = Decode.RELEASED,
) -> list[float]:
    """When each request has its last token, given when it has its first."""
    pipeline = _Pipeline(requests, model, None, layout, how)
    return pipeline.run(sorted((at, number) for number, at in enumerate(ready_s)))[1]


def play_split(
    requests: Sequence[Arriving], model: PerformanceModel, prefill: Layout, decode: Layout, how: Decode = Decode.RELEASED
) -> list[Timing]:
    """One prefill replica, one decode replica."""
    ready = play_prefill(requests, model, prefill)
    return _timings(requests, ready, play_decode(ready, requests, model, decode, how))


def play_colocated(requests: Sequence[Arriving], model: PerformanceModel, layout: Layout) -> list[Timing]:
    """Both phases on one replica, waiting prompts first and whole: the colocated baseline of DistServe."""
    pipeline = _Pipeline(requests, model, layout, layout, Decode.RELEASED)
    return _timings(requests, *pipeline.run([(request.arrival_s, number) for number, request in enumerate(requests)]))


def _timings(requests: Sequence[Arriving], ready: Sequence[float], end: Sequence[float]) -> list[Timing]:
    return [
        Timing(first - request.arrival_s, (last - first) / request.output_tokens)
        for request, first, last in zip(requests, ready, end, strict=True)
    ]


class _Stage:
    __slots__ = ("busy", "decoding", "prompts")

    def __init__(self) -> None:
        self.busy = False
        self.prompts: deque[list[int]] = deque()  # batches; at the first stage, of one prompt each
        self.decoding: deque[int] = deque()


class _Pipeline:
    """Requests go round the stages once per token. `prefill` None: they come with their prompts done."""

    def __init__(
        self, requests: Sequence[Arriving], model: PerformanceModel, prefill: Layout | None, decode: Layout, how: Decode
    ) -> None:
        self._requests = requests
        self._model = model
        self._prefill = prefill
        self._decode = decode
        self._stages = [_Stage() for _ in range(decode.pp)]
        self._tokens_max = model.kv_tokens(prefill) if prefill is not None else 0
        self._room = model.kv_tokens(decode) if how is Decode.BOUNDED else None
        self._held = 0
        self._waiting: deque[int] = deque()  # for memory
        self._made = [0] * len(requests)
        self._ready = [0.0] * len(requests)
        self._end = [0.0] * len(requests)
        self._heap: list[tuple[float, int, int, list[int], bool]] = []  # end of a step, order, stage, batch, whether prompts
        self._order = 0

    def run(self, entering: Sequence[tuple[float, int]]) -> tuple[list[float], list[float]]:
        """(time, number) of each request in order of time; when each has its first and its last token."""
        coming = deque(entering)
        while coming or self._heap:
            if coming and (not self._heap or coming[0][0] <= self._heap[0][0]):
                now = coming[0][0]
                while coming and coming[0][0] == now:
                    self._arrive(coming.popleft()[1], now)
                self._start(0, now)
            else:
                now, _, stage, batch, prompts = heapq.heappop(self._heap)
                self._stages[stage].busy = False
                (self._after_prompts if prompts else self._after_decode)(stage, batch, now)
                self._start((stage + 1) % len(self._stages), now)
                self._start(stage, now)
        return self._ready, self._end

    def _arrive(self, number: int, now: float) -> None:
        if self._prefill is not None:
            self._stages[0].prompts.append([number])
            return
        self._ready[number] = now
        self._enter([number])

    def _start(self, number: int, now: float) -> None:
        stage = self._stages[number]
        if stage.busy or not (stage.prompts or stage.decoding):
            return
        prompts = bool(stage.prompts)
        batch, held = self._take_prompts(stage, number) if prompts else self._take_decode(stage)
        if prompts:
            assert self._prefill is not None, "prompts only come where they are computed"
            squares = sum(self._requests[one].input_tokens ** 2 for one in batch)
            seconds = self._model.prefill_s(held, squares, self._prefill)
        else:
            seconds = self._model.decode_s(len(batch), held + len(batch), self._decode)
        if number == 0:
            seconds += self._model.overhead_s(held)
        stage.busy = True
        self._order += 1
        heapq.heappush(self._heap, (now + seconds, self._order, number, batch, prompts))

    def _take_prompts(self, stage: _Stage, number: int) -> tuple[list[int], int]:
        """A batch and its tokens: formed at the first stage, kept together at the others."""
        batch = stage.prompts.popleft()
        tokens = sum(self._requests[one].input_tokens for one in batch)
        if number == 0:
            while stage.prompts:
                more = self._requests[stage.prompts[0][0]].input_tokens
                if tokens + more > self._tokens_max:
                    break
                batch += stage.prompts.popleft()
                tokens += more
        return batch, tokens

    def _take_decode(self, stage: _Stage) -> tuple[list[int], int]:
        """As many as the cap lets, one at least, and the tokens they hold."""
        batch: list[int] = []
        held = 0
        while stage.decoding:
            context = self._requests[stage.decoding[0]].input_tokens + self._made[stage.decoding[0]]
            if batch and held + len(batch) + context + 1 > DECODE_CONTEXT_MAX:
                break
            batch.append(stage.decoding.popleft())
            held += context
        return batch, held

    def _after_prompts(self, stage: int, batch: list[int], now: float) -> None:
        if stage + 1 < len(self._stages):
            self._stages[stage + 1].prompts.append(batch)
            return
        for number in batch:
            self._ready[number] = now
        self._enter(batch)

    def _enter(self, numbers: Sequence[int]) -> None:
        """In order of arrival, as memory allows; what would never fit goes in alone."""
        self._waiting.extend(numbers)
        while self._waiting:
            if self._room is not None:
                wanted = self._whole(self._waiting[0])
                if wanted > self._room and self._held:
                    return
                self._room -= wanted
                self._held += 1
            self._stages[0].decoding.append(self._waiting.popleft())

    def _whole(self, number: int) -> int:
        request = self._requests[number]
        return request.input_tokens + request.output_tokens

    def _after_decode(self, stage: int, batch: list[int], now: float) -> None:
        if stage + 1 < len(self._stages):
            self._stages[stage + 1].decoding.extend(batch)
            return
        first = self._stages[0].decoding
        for number in batch:
            self._made[number] += 1
            if self._made[number] >= self._requests[number].output_tokens:
                self._end[number] = now
                if self._room is not None:
                    self._room += self._whole(number)
                    self._held -= 1
                    self._enter(())
            else:
                first.append(number)
