"""Requests through a cluster of Splitwise's: prompt, token and mixed pools, and the colocated baseline. Deciding code.

Patel et al., ISCA 2024, and its released simulator: a request gets its prompt machine and its token machine at
once, by fewest pending tokens and least promised memory; who is full lends from the mixed pool, then from the opposite one.
The KV crosses a link of its own at `link_bytes_per_s` after the prompt, nothing contends for it.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cluster.planner_model import Arriving
from cluster.splitwise_machine import Machine, StepTime, Task

PROMPT_PENDING_MAX = 8192
LINK_BYTES_PER_S = 200 * 2**30
"""The released simulator's: it means 200 Gb/s and computes with 200 GiB/s."""


@dataclass(frozen=True, slots=True)
class Pool:
    """`machines` of one kind. `home`: prompt or token, or mixed for those that do both (the baseline)."""

    kind: str
    home: str
    machines: int
    step_s: StepTime
    kv_capacity: int


class Played(NamedTuple):
    """Times from arrival. `transfer_s` and `token_start_s` (on the clock of the arrivals) are 0 where there was none."""

    ttft_s: float
    response_s: float
    transfer_s: float
    token_start_s: float

    def tbt_s(self, output_tokens: int) -> float:
        """As its authors count: over all output tokens, the first too."""
        return (self.response_s - self.ttft_s) / output_tokens


def play(
    requests: Sequence[Arriving], pools: Sequence[Pool], kv_token_bytes: int, link_bytes_per_s: float = LINK_BYTES_PER_S
) -> list[Played]:
    """One result per request, in order; arrivals must not decrease.

    Raises ValueError when a request can never be held by any machine.
    """
    return _Cluster(requests, pools, kv_token_bytes / link_bytes_per_s).run()


class _Cluster:
    def __init__(self, requests: Sequence[Arriving], pools: Sequence[Pool], token_transfer_s: float) -> None:
        machines = [(pool, number) for pool in pools for number in range(pool.machines)]
        self._machines = [
            Machine(index, pool.kind, pool.home, pool.step_s, pool.kv_capacity) for index, (pool, _) in enumerate(machines)
        ]
        self._pool: dict[str, list[Machine]] = {
            name: [machine for machine in self._machines if machine.home == name] for name in ("prompt", "token", "mixed")
        }
        self._baseline = not self._pool["prompt"] and not self._pool["token"]
        self._requests = requests
        self._token_transfer_s = token_transfer_s
        self._places: list[tuple[Machine, Machine]] = []
        self._ttft: list[float] = [0.0] * len(requests)
        self._response: list[float] = [0.0] * len(requests)
        self._transfer: list[float] = [0.0] * len(requests)
        self._token_start: list[float] = [0.0] * len(requests)
        self._heap: list[tuple[float, int, int, int]] = []  # time, order, machine or −1 − request that arrives there, event
        self._order = 0

    def run(self) -> list[Played]:
        for number, request in enumerate(self._requests):
            self._until(request.arrival_s)
            self._arrive(number, request)
        self._until(float("inf"))
        return [Played(*one) for one in zip(self._ttft, self._response, self._transfer, self._token_start, strict=True)]

    def _until(self, end: float) -> None:
        while self._heap and self._heap[0][0] <= end:
            now, _, what, event = heapq.heappop(self._heap)
            if what < 0:
                self._moved_in(-1 - what, now)
            elif event == self._machines[what].event:
                self._iterated(self._machines[what], now)

    def _arrive(self, number: int, request: Arriving) -> None:
        first, second = self._jsq() if self._baseline else self._mixed_pool(request)
        if request.input_tokens + request.output_tokens > second.kv_capacity:
            raise ValueError(f"request {number} needs more memory than a machine of kind {second.kind} has")
        whole = request.input_tokens + request.output_tokens
        first.promised_tokens += request.input_tokens
        second.promised_tokens += 1
        second.promised_kv += whole
        if first is not second:
            first.promised_kv += request.input_tokens + 1
        self._places.append((first, second))
        prompt = Task(number, request.arrival_s, True, request.input_tokens, 1, request.input_tokens + 1)
        self._watch(first, first.add(prompt, request.arrival_s, first is second))

    def _iterated(self, machine: Machine, now: float) -> None:
        for task in machine.finish():
            if task.prompt:
                self._prompt_done(machine, task, now)
            else:
                self._token_start[task.request] = task.start_s
                self._ended(machine, task.request, now)
        going = machine.start(now)
        self._watch(machine, going)
        if not going and not machine.waiting and machine.home != "mixed" and machine in self._pool["mixed"]:
            self._pool["mixed"].remove(machine)
            self._pool[machine.home].append(machine)

    def _prompt_done(self, machine: Machine, task: Task, now: float) -> None:
        number, second = task.request, self._places[task.request][1]
        request = self._requests[number]
        machine.promised_tokens -= request.input_tokens
        self._ttft[number] = now - request.arrival_s
        if request.output_tokens == 1:
            self._ended(machine, number, now)
        elif second is machine:
            machine.queue(self._decode(number))
        else:
            seconds = request.input_tokens * self._token_transfer_s
            self._transfer[number] = seconds
            second.kv += request.input_tokens + 1
            self._push(now + seconds, -1 - number, 0)

    def _moved_in(self, number: int, now: float) -> None:
        first, second = self._places[number]
        held = self._requests[number].input_tokens + 1
        first.promised_kv -= held
        self._watch(second, second.add(self._decode(number), now))
        self._watch(first, first.free_kv(held, now))

    def _decode(self, number: int) -> Task:
        request = self._requests[number]
        left = request.output_tokens - 1
        return Task(number, request.arrival_s, False, 1, left, left, request.input_tokens + 1)

    def _ended(self, machine: Machine, number: int, now: float) -> None:
        request, (first, second) = self._requests[number], self._places[number]
        self._response[number] = now - request.arrival_s
        whole = request.input_tokens + request.output_tokens
        second.promised_tokens -= 1
        second.promised_kv -= whole
        if first is not second and machine is first:
            first.promised_kv -= request.input_tokens + 1
        machine.kv -= whole if machine is second else request.input_tokens + 1

    def _watch(self, machine: Machine, going: bool) -> None:
        if going:
            self._push(machine.ends_s, machine.number, machine.event)

    def _push(self, at: float, what: int, event: int) -> None:
        self._order += 1
        heapq.heappush(self._heap, (at, self._order, what, event))

    def _jsq(self) -> tuple[Machine, Machine]:
        machine = min(self._pool["mixed"], key=lambda one: one.promised_tokens)
        return machine, machine

    def _mixed_pool(self, request: Arriving) -> tuple[Machine, Machine]:
        prompts, tokens, mixed = self._pool["prompt"], self._pool["token"], self._pool["mixed"]
        first = self._prompt_machine(prompts, request) or self._prompt_machine(mixed, request)
        second = self._token_machine(tokens, request) or self._token_machine(mixed, request)
        if first is None and tokens:
            first = min(tokens, key=lambda one: one.promised_tokens)
            tokens.remove(first)
            mixed.append(first)
        if second is None and prompts:
            second = min(prompts, key=lambda one: one.promised_kv)
            prompts.remove(second)
            mixed.append(second)
        if first is None or second is None:
            least = min(prompts + mixed + tokens, key=lambda one: one.promised_tokens)
            return least, least
        return first, second

    def _prompt_machine(self, machines: list[Machine], request: Arriving) -> Machine | None:
        best = min(machines, key=lambda one: one.promised_tokens, default=None)
        if best is not None and best.waiting and best.promised_tokens + request.input_tokens > PROMPT_PENDING_MAX:
            return None
        return best

    def _token_machine(self, machines: list[Machine], request: Arriving) -> Machine | None:
        best = min(machines, key=lambda one: one.promised_kv, default=None)
        if best is not None and best.promised_kv + request.input_tokens + request.output_tokens >= best.kv_capacity:
            return None
        return best
