"""One machine of Splitwise's cluster: what it runs in each iteration, as its authors' simulator has it. Deciding code.

Iteration-level batching of whole prompts (Patel et al., ISCA 2024): at most 512 sequences and 2,048 tokens, a
longer prompt alone; prompts before tokens, whoever was passed over four times before everybody. A run of iterations in which
nobody ends is one event.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from core.cost_model import StepShape

BATCH_MAX = 512
BATCH_TOKENS_MAX = 2048
PREEMPTIONS_MAX = 4
StepTime = Callable[[StepShape], float]


@dataclass(eq=False, slots=True)
class Task:
    """One phase of a request. `left`: iterations, 1 for a prompt; `kv_tokens`: memory that beginning it takes;
    `context`: tokens
    that a decode looks at; `start_s`: of its first iteration."""

    request: int
    arrival_s: float
    prompt: bool
    tokens: int
    left: int
    kv_tokens: int
    context: int = 0
    passed_over: int = 0
    begun: bool = False
    start_s: float = -1.0


@dataclass(eq=False, slots=True)
class Machine:
    """`home`: the pool it belongs to; `kind`: what it is. `promised…` is the cluster scheduler's account of it, in tokens."""

    number: int
    kind: str
    home: str
    step_s: StepTime
    kv_capacity: int
    promised_tokens: int = 0
    promised_kv: int = 0
    kv: int = 0
    batch: list[Task] = field(default_factory=list)
    prompts: list[Task] = field(default_factory=list)
    preempted: list[Task] = field(default_factory=list)
    fresh: list[Task] = field(default_factory=list)  # decodes that wait for their first iteration, the oldest request first
    iterations: int = 0
    event: int = 0  # of the iterations that are under way; older ones are void
    _step: float = 0.0
    _start: float = 0.0
    _paused: bool = False
    _tokens: int = 0

    @property
    def waiting(self) -> int:
        return len(self.prompts) + len(self.preempted) + len(self.fresh)

    @property
    def ends_s(self) -> float:
        return self._start + self.iterations * self._step

    def add(self, task: Task, now: float, stays: bool = False) -> bool:
        """Whether there is a new end of the iterations to wait for. `stays`: the decode of this prompt comes with it, and one
        more token always finds room, so even a long prompt does not wait until somebody ends."""
        self._queue(task)
        if not self.batch:
            return self.kv + task.kv_tokens <= self.kv_capacity and self.start(now)
        in_prompts = self._tokens - sum(not one.prompt for one in self.batch)
        least = 1 if stays else task.tokens
        room = len(self.batch) < BATCH_MAX and self._tokens + least <= BATCH_TOKENS_MAX
        return (room or (task.prompt and in_prompts + task.tokens <= BATCH_TOKENS_MAX)) and self._pause(now)

    def queue(self, task: Task) -> None:
        """A decode that follows its prompt on the same machine; it enters with the next iteration."""
        self._queue(task)

    def free_kv(self, tokens: int, now: float) -> bool:
        """Memory came back while others waited for it; as `add`."""
        self.kv -= tokens
        if not self.waiting:
            return False
        return self._pause(now) if self.batch else self.start(now)

    def start(self, now: float) -> bool:
        """Chooses the next batch; False when there is none."""
        self._choose()
        self._paused = False
        if not self.batch:
            return False
        for task in self.batch:
            if task.start_s < 0:
                task.start_s = now
        prompt_tokens = sum(task.tokens for task in self.batch if task.prompt)
        rows = sum(not task.prompt for task in self.batch)
        context = sum(task.context for task in self.batch)
        self._step, self._start = self.step_s(StepShape(prompt_tokens, 0, rows, context)), now
        self.iterations = 1 if prompt_tokens else min(task.left for task in self.batch)
        self.event += 1
        return True

    def finish(self) -> list[Task]:
        """The iterations are over; who is done leaves. `start` is to follow."""
        for task in self.batch:
            task.left -= 1 if task.prompt else self.iterations
            task.context += 0 if task.prompt else self.iterations
        done = [task for task in self.batch if task.left <= 0]
        self.batch = [task for task in self.batch if task.left > 0]
        return done

    def _pause(self, now: float) -> bool:
        """A run of iterations ends with the one that is under way."""
        if self._paused or any(task.prompt for task in self.batch):
            return False
        self._paused = True
        self.iterations = math.floor((now - self._start) / self._step) + 1
        self.event += 1
        return True

    def _queue(self, task: Task) -> None:
        line = self.prompts if task.prompt else self.fresh
        line.append(task)
        if len(line) > 1 and line[-2].arrival_s > task.arrival_s and not task.prompt:
            line.sort(key=lambda one: one.arrival_s)

    def _choose(self) -> None:
        chosen: list[Task] = []
        tokens = 0
        lines: list[list[Task]] = [self.prompts, self.preempted, self.batch, self.fresh]
        waiting = self.prompts + self.preempted + self.fresh
        if any(task.passed_over >= PREEMPTIONS_MAX for task in waiting):
            overdue = [task for task in waiting if task.passed_over >= PREEMPTIONS_MAX]
            lines.insert(0, sorted(overdue, key=lambda task: (task.passed_over, task.arrival_s)))
        taken: set[int] = set()
        for line in lines:
            for task in line:
                if id(task) in taken:
                    continue
                if len(chosen) == BATCH_MAX or (chosen and tokens + task.tokens > BATCH_TOKENS_MAX):
                    break
                if not task.begun:
                    if self.kv + task.kv_tokens > self.kv_capacity:
                        break
                    self.kv += task.kv_tokens
                    task.begun = True
                chosen.append(task)
                taken.add(id(task))
                tokens += task.tokens
        self._tokens = tokens
        self.preempted = [task for task in self.preempted + self.batch if id(task) not in taken]
        self.prompts = [task for task in self.prompts if id(task) not in taken]
        self.fresh = [task for task in self.fresh if id(task) not in taken]
        for line in (self.prompts, self.preempted, self.fresh):
            for task in line:
                task.passed_over += 1
        self.batch = chosen
