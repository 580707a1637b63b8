"""The step loop over numbers of tokens instead of tokens, several steps at a time where nothing changes between them.

What is decided is decided by the shipped `StepLoop` and its `Scheduler`: who enters, who computes how much, who gives way, who
leaves. Here tokens are counted instead of kept, blocks are announced by number instead of by record, and as long as every
sequence of a batch computes one token per step and none ends, the steps in between are taken in one go (`begin`, `finish`). A
test holds this loop against `StepLoop` step by step.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import cast

from core.blocks import BlockKey, BlockRecord, blocks_for
from core.config import EngineConfig
from core.cost_model import StepCost, StepShape
from core.inventory import Inventory
from core.request import FinishReason, TokenEvent, WorkItem
from engine.loop import StepLoop, _Changes
from engine.output import Committed, StepOutput
from engine.role import Role, Terms
from engine.sequence import Sequence
from engine.step import Executor, Sampled
from sim.prompt import Prompt

ANY_ID = 1
"""Of every token that is only counted."""
StepTime = Callable[[StepShape], float]


class CountedSequence(Sequence):
    """`tokens` is a range: as long as the tokens would be. `ends_at`: with so many the answer is complete."""

    __slots__ = ("_stops_at", "ends_at", "entered_len")

    def __init__(self, seq_id: int, item: WorkItem, terms: Terms, root: BlockKey, now: float) -> None:
        self.seq_id = seq_id
        self.item = item
        self.key = item.key
        self.terms = terms
        self.root = root
        self.entered_len = len(item.token_ids)
        self._count(self.entered_len)
        self.prompt_len = item.prompt_len
        self.max_len = item.max_len
        self._stops_at = item.prompt_len + _prompt(item).content.output_tokens
        self.ends_at = min(self._stops_at, item.max_len)
        self.blocks = []
        self.computed = 0
        self.keys = []
        self.committed_blocks = 0
        self.cached_tokens = 0
        self.arrived = now
        self.deadline = now + item.remaining_s if item.remaining_s > 0 else float("inf")
        self.first_scheduled = None
        self.reported = False
        self.shared = True

    def keys_until(self, full_blocks: int, block_size: int) -> list[BlockKey]:
        return _prompt(self.item).content.keys(full_blocks)

    def append(self, token_id: int) -> FinishReason | None:
        return self.grow(1)

    def grow(self, count: int) -> FinishReason | None:
        length = len(self.tokens) + count
        self._count(length)
        if length < self.ends_at:
            return None
        return FinishReason.STOP if length >= self._stops_at else FinishReason.LENGTH

    def _count(self, length: int) -> None:
        self.tokens = cast(list[int], range(length))


def _prompt(item: WorkItem) -> Prompt:
    return cast(Prompt, item.token_ids)


class CountedLoop(StepLoop):
    """`begin` decides a step and says when it ends, `finish` books it. `horizon_s`: of steps taken in one go."""

    sequence = CountedSequence

    def __init__(
        self, config: EngineConfig, role: Role, inventory: Inventory, executor: Executor, step_s: StepTime, horizon_s: float
    ) -> None:
        super().__init__(config, role, inventory, executor, lambda salt: salt)
        self._step_s = step_s
        self._horizon_s = horizon_s
        owner = getattr(step_s, "__self__", None)
        self._linear = owner if isinstance(owner, StepCost) else None
        self._work: list[tuple[CountedSequence, int]] = []
        self._ends: list[float] = []  # of the steps under way
        self._changes = _Changes()
        self._end = 0.0

    def begin(self, now: float) -> float:
        """Decides the next step, or several alike, and says when the last one ends; now when nothing is computed."""
        changes = self._changes = _Changes()
        schedule = self._scheduler.schedule(self.role, now)
        announced = self._settle(schedule, changes, now)
        self._work = [] if announced else cast(list[tuple[CountedSequence, int]], schedule.work)
        if not self._work:
            self._ends = []
            return now
        changes.shape = StepShape.of((count, sequence.computed) for sequence, count in self._work)
        first = now + self._step_s(changes.shape)
        self._ends = [first]
        if changes.shape.decode_rows == len(self._work) and not changes.given_back and not schedule.victims:
            self._look_ahead(now, changes.shape)
        return self._ends[-1]

    def cut(self, now: float) -> tuple[float, StepOutput]:
        """Something changes: the step of this moment will be the last one of those under way. Returns its end, and what those
        before it computed, which is booked: the inventory is as it is in that step."""
        ends, output = self._ends, StepOutput()
        done = min(bisect_left(ends, now), len(ends) - 1)
        if done > 0:
            rows, context = len(self._work), self._changes.shape.decode_context
            self._book_many(self._changes, ends[:done])
            output = self._gathered(self._changes)
            self._changes = _Changes(shape=StepShape(0, 0, rows, context + done * rows))
            self._hold(0)
        self._ends = ends[max(done, 0) : done + 1]
        return (self._ends[0] if self._ends else now), output

    def sync(self, now: float) -> None:
        """The inventory is as it is in the step of this moment; the steps go on."""
        if len(self._ends) > 1:
            self._hold(min(bisect_left(self._ends, now), len(self._ends) - 1))

    def squeezed(self, now: float) -> bool:
        """Whether the steps under way might not find all the memory any more that they were decided on."""
        left = len(self._ends) - bisect_left(self._ends, now)
        return left > 1 and len(self._work) * -(-left // self._block_size) > self._scheduler._available()

    def finish(self) -> StepOutput:
        """Books the steps that `begin` decided, as far as they were not cut."""
        changes, ends = self._changes, self._ends
        if len(ends) > 1:
            self._book_many(changes, ends)
        elif ends:
            self._end = ends[0]
            self._book(changes)
        self._ends, self._work = [], []
        return self._gathered(self._changes)

    # ---- one step --------------------------------------------------------------------------------------------------

    def _book(self, changes: _Changes) -> None:
        """As `StepLoop._advance`; who was cancelled meanwhile is gone."""
        end, size = self._end, self._block_size
        for sequence, count in self._work:
            changes.num_tokens += count
            sequence.computed += count
            first = sequence.committed_blocks
            if sequence.computed // size > first:
                self._commit_full(sequence)
                if sequence.terms.hand_over:
                    self._announce(sequence, first, changes, end)
            if sequence.computed == len(sequence.tokens):
                position = sequence.computed - sequence.prompt_len
                self._take(sequence, Sampled(sequence.seq_id, ANY_ID, end, ()), position, changes, end)

    def _announce(self, sequence: Sequence, first: int, changes: _Changes, now: float) -> None:
        blocks = sequence.blocks[first : sequence.committed_blocks]
        self._inventory.lease(sequence.key, blocks, now + sequence.terms.lease_s)
        changes.committed.append(Committed(sequence.key, cast(tuple[BlockRecord, ...], range(first, first + len(blocks)))))

    # ---- many steps ------------------------------------------------------------------------------------------------

    def _look_ahead(self, now: float, shape: StepShape) -> None:
        """How many steps like the first one follow: until somebody ends, or memory might run short, or the horizon.

        Who has only begun to decode takes a step alone, so that its router learns in time how long its first gap was.
        """
        rows, most = len(self._work), 1 << 30
        for sequence, _ in self._work:
            length = len(sequence.tokens)
            most = min(most, sequence.ends_at - length)
            if length < sequence.entered_len + 2:
                return
        room, size = self._scheduler._available(), self._block_size
        while most > 1 and rows * (-(-most // size)) > room:
            most //= 2
        ends, horizon = self._ends, now + self._horizon_s
        at = ends[0]
        for took_s in self._more_steps(rows, shape.decode_context, most):
            at += took_s
            if at > horizon:
                return
            ends.append(at)

    def _more_steps(self, rows: int, context: int, most: int) -> Iterator[float]:
        """What the second step of so many rows takes, and those after it. A linear cost grows by the same each time."""
        linear = self._linear
        if linear is None:
            return (self._step_s(StepShape(0, 0, rows, context + n * rows)) for n in range(1, most))
        more_s = linear.decode_context_s * rows
        first_s = linear.decode_s(rows, context) + more_s
        return (first_s + n * more_s for n in range(most - 1))

    def _hold(self, steps: int) -> None:
        """Takes the blocks that all rows need in the step after so many."""
        size, allocate = self._block_size, self._inventory.allocate
        for sequence, _ in self._work:
            missing = blocks_for(len(sequence.tokens) + steps, size) - len(sequence.blocks)
            if missing > 0:
                sequence.blocks += allocate(missing)

    def _book_many(self, changes: _Changes, ends: list[float]) -> None:
        count, size = len(ends), self._block_size
        self._hold(count - 1)
        rows, shape = len(self._work), changes.shape
        changes.num_tokens += count * rows
        changes.shape = StepShape(0, 0, rows * count, count * shape.decode_context + rows * (count * (count - 1) // 2))
        for sequence, _ in self._work:
            key, first = sequence.key, len(sequence.tokens) - sequence.prompt_len
            sequence.computed += count
            reason = sequence.grow(count)
            made = [TokenEvent(key, position, ANY_ID, end) for position, end in enumerate(ends, first)]
            if reason is not None:
                made[-1] = made[-1]._replace(finish_reason=reason)
            changes.tokens += made
            if sequence.computed // size > sequence.committed_blocks:
                self._commit_full(sequence)
            if reason is not None:
                self._drop(sequence)
