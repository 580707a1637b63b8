"""The step loop of one replica: admit, plan, run, commit, leave. Prefill, decode and colocated workers all turn it.

Deciding code apart from the executor it drives: time comes in with every call. One thread owns a loop; only the
inventory is shared with others, who may free blocks at any time.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from core.blocks import BlockKey, BlockRecord, Closing
from core.config import EngineConfig
from core.cost_model import StepShape
from core.errors import InternalError, InvalidRequestError, OverloadedError
from core.inventory import Inventory
from core.request import AttemptKey, AttemptTiming, FinishReason, TokenEvent, WorkItem
from engine.output import NO_SHAPE, Committed, EngineLoad, Failed, GivenBack, Prefilled, StepOutput
from engine.role import Role, Shortage, Terms
from engine.scheduler import Schedule, Scheduler
from engine.sequence import Sequence
from engine.step import Executor, Row, Sampled, StepPlan

__all__ = [
    "Committed",
    "EngineLoad",
    "Failed",
    "GivenBack",
    "Prefilled",
    "Role",
    "Shortage",
    "StepLoop",
    "StepOutput",
    "Terms",
]

FAILED_STEPS_MAX = 3


@dataclass(slots=True)
class _Changes:
    """A StepOutput in the making."""

    tokens: list[TokenEvent] = field(default_factory=list)
    committed: list[Committed] = field(default_factory=list)
    prefilled: list[Prefilled] = field(default_factory=list)
    joined: list[AttemptKey] = field(default_factory=list)
    given_back: list[GivenBack] = field(default_factory=list)
    failed: list[Failed] = field(default_factory=list)
    num_tokens: int = 0
    shape: StepShape = NO_SHAPE


class StepLoop:
    """Continuous batching over one executor.

    `root_key` maps a tenant's cache salt to the parent key of its prompts. `role` may be replaced between steps: what is
    inside stays on the terms on which it entered. `clock` tells the time at the end of a step; without it a step takes none.
    """

    sequence: type[Sequence] = Sequence

    def __init__(
        self,
        config: EngineConfig,
        role: Role,
        inventory: Inventory,
        executor: Executor,
        root_key: Callable[[bytes], BlockKey],
        clock: Callable[[], float] | None = None,
    ) -> None:
        total = inventory.counts().total
        assert total <= executor.num_blocks, "the inventory names blocks that the executor does not have"
        self.role = role
        self._config = config
        self._inventory = inventory
        self._executor = executor
        self._root_key = root_key
        self._clock = clock
        self._block_size = executor.layout.block_size
        self._capacity_tokens = total * self._block_size
        self._scheduler = Scheduler(config, inventory, self._block_size)
        self._sequences: dict[AttemptKey, Sequence] = {}
        self._arrivals = 0
        self._left: list[AttemptKey] = []
        self._failed_steps = 0

    def __len__(self) -> int:
        """Attempts in here, whatever they wait for."""
        return len(self._sequences)

    def submit(
        self,
        item: WorkItem,
        now: float,
        blocks: Seq[int] | None = None,
        computed_len: int = 0,
        root: BlockKey | None = None,
        terms: Terms | None = None,
    ) -> None:
        """Takes a request in, to wait for memory and a place in the batch.

        With `blocks`, KV is handed in: one reference on each moves from the caller to the loop, in order of index; the
        first `computed_len` tokens of the item have KV in them, and at least one token has not. `root`: the parent of the
        item's keys when that KV is not what this model computes, as after a lossy codec; the full blocks handed in are
        committed already then, and what is computed on top of them goes under keys of that chain. `terms`: those it was
        sent on, where they are not what the role of this moment would say; workers change roles. Nothing is taken over when
        this raises InvalidRequestError (it can never be served here) or OverloadedError (too many wait).
        """
        if item.key in self._sequences:
            raise InvalidRequestError(f"{item.key} is already here; a new placement needs a higher attempt")
        terms = terms or self.role.enter(item, blocks is not None)
        self._check_fits(item, terms)
        if blocks is None and len(self._scheduler.waiting) >= self._config.max_waiting:
            raise OverloadedError(
                f"{len(self._scheduler.waiting)} requests wait here already; retry later, or raise engine.max_waiting",
                retry_after_s=1.0,
            )
        sequence = self.sequence(self._arrivals, item, terms, root or self._root_key(item.cache_salt), now)
        sequence.shared = root is None
        if blocks is None:
            self._scheduler.waiting.append(sequence)
        else:
            assert computed_len <= len(blocks) * self._block_size, "KV is claimed for tokens that no block is given for"
            sequence.place(list(blocks), computed_len)
            sequence.reported = True
            if root is None:
                self._commit_full(sequence)
            else:
                sequence.committed_blocks = computed_len // self._block_size
            self._scheduler.ready.append(sequence)
        self._arrivals += 1
        self._sequences[item.key] = sequence

    def cancel(self, key: AttemptKey) -> None:
        """Drops an attempt and all it holds, at once; what a prefill in progress has leased is released too. Idempotent."""
        sequence = self._sequences.get(key)
        if sequence is not None:
            self._abandon(sequence)

    def has_work(self) -> bool:
        """Whether a step would get anywhere. False although something waits when no memory can be had for it: then it
        turns true once another thread frees blocks, so look again when a lease ends."""
        return bool(self._left) or self._scheduler.runnable()

    def step(self, now: float) -> StepOutput:
        """Computes one batch. Raises InternalError when the executor keeps failing; a single failed step is survived and
        costs the sequences that were in it.

        A step that admits a hand-over whose prefix is cached returns before it computes, so that pulling starts at once.
        """
        changes = _Changes()
        schedule = self._scheduler.schedule(self.role, now)
        announced = self._settle(schedule, changes, now)
        if schedule.work and not announced:
            self._compute(schedule.work, changes, now)
        return self._gathered(changes)

    def _gathered(self, changes: _Changes) -> StepOutput:
        """What a step says of itself, and of who left since the last one did."""
        left, self._left = self._left, []
        return StepOutput(
            tuple(changes.tokens),
            tuple(changes.committed),
            tuple(changes.prefilled),
            tuple(changes.joined),
            tuple(left),
            tuple(changes.given_back),
            tuple(changes.failed),
            changes.num_tokens,
            changes.shape,
        )

    def waits(self) -> bool:
        """Whether anybody waits for memory or for a place in the batch."""
        return bool(self._scheduler.waiting or self._scheduler.ready)

    def load(self) -> EngineLoad:
        """May be called from any thread."""
        running, ready, waiting = (tuple(q) for q in (self._scheduler.running, self._scheduler.ready, self._scheduler.waiting))
        prompts = sum(s.pending for s in waiting) + sum(s.pending for s in running if s.pending > 1)
        return EngineLoad(len(running), len(ready) + len(waiting), prompts, sum(s.computed for s in running))

    def holding(self) -> dict[AttemptKey, list[int]]:
        """Every attempt in here and the blocks it has references on. For audits, between two steps."""
        return {key: sequence.blocks for key, sequence in self._sequences.items()}

    def check(self) -> None:
        """Asserts that queues, sequences and inventory agree; for idle moments and tests."""
        queued = [*self._scheduler.running, *self._scheduler.ready, *self._scheduler.waiting]
        assert len(queued) == len(self._sequences), "a sequence is queued twice or not at all"
        assert all(self._sequences[s.key] is s for s in queued), "a queue holds a sequence that left"
        held = {block for s in queued for block in s.blocks}
        assert len(held) <= self._inventory.counts().active, "a sequence uses blocks that are not held"
        self._inventory.check()

    def _check_fits(self, item: WorkItem, terms: Terms) -> None:
        if len(item.token_ids) >= item.max_len:
            raise InvalidRequestError(f"{item.key} has all its {item.sampling.max_tokens} tokens; raise max_tokens for more")
        longest = len(item.token_ids) if terms.hand_over else item.max_len
        if longest > self._capacity_tokens:
            raise InvalidRequestError(
                f"{item.key} needs KV memory for {longest} tokens and this worker has {self._capacity_tokens}: "
                "shorten the prompt, lower max_tokens, or raise engine.kv_bytes"
            )

    def _settle(self, schedule: Schedule, changes: _Changes, now: float) -> bool:
        """Carries out what planning decided about who enters and who gives way. True when blocks were announced."""
        changes.joined += [sequence.key for sequence in schedule.joined]
        for sequence in schedule.late:
            self._fail(sequence, changes, "its deadline passed while it waited for a place in the batch", late=True)
        for sequence in schedule.victims:
            if sequence.terms.hand_over or self.role.on_shortage() is Shortage.GIVE_BACK:
                self._abandon(sequence)
                changes.given_back.append(GivenBack(sequence.key, "KV memory ran short on this worker"))
            else:
                self._executor.forget(sequence.seq_id)
                self._scheduler.requeue(sequence)
        for sequence in schedule.admitted:
            if sequence.first_scheduled is None:
                sequence.first_scheduled = now
            if sequence.terms.hand_over and sequence.committed_blocks:
                self._announce(sequence, 0, changes, now)
        return bool(changes.committed)

    def _compute(self, work: list[tuple[Sequence, int]], changes: _Changes, now: float) -> None:
        rows = tuple([sequence.row(count) for sequence, count in work])
        try:
            samples = self._run(rows)
        except Exception:  # whatever it is, it must not take the streams beside it along
            self._compute_alone(work, changes, now)
            return
        self._failed_steps = 0
        self._advance(work, rows, samples, changes, now)

    def _compute_alone(self, work: list[tuple[Sequence, int]], changes: _Changes, now: float) -> None:
        """After a failed step: its rows one by one, so that only those fail that fail alone.

        A row writes the same KV when it is computed again. When no row succeeds, the executor itself may be broken.
        """
        last: Exception | None = None
        self._failed_steps += 1
        for sequence, count in work:
            self._executor.forget(sequence.seq_id)  # it may hold half a step
            rows = (sequence.row(count),)
            try:
                samples = self._run(rows)
            except Exception as error:
                last = error
                self._fail(sequence, changes, f"computing it failed: {type(error).__name__}: {error}")
            else:
                self._failed_steps = 0
                self._advance([(sequence, count)], rows, samples, changes, now)
        if self._failed_steps >= FAILED_STEPS_MAX:
            raise InternalError(f"{self._failed_steps} steps failed in a row, the last with {last!r}") from last

    def _advance(
        self, work: list[tuple[Sequence, int]], rows: tuple[Row, ...], samples: list[Sampled], changes: _Changes, now: float
    ) -> None:
        """Books computed rows: commits what became full, announces it, takes the samples."""
        end = self._clock() if self._clock else now
        changes.shape += StepShape.of((count, sequence.computed) for sequence, count in work)
        block_size, sampled = self._block_size, iter(samples)
        for (sequence, count), row in zip(work, rows, strict=True):
            changes.num_tokens += count
            sequence.computed += count
            first = sequence.committed_blocks
            if sequence.computed // block_size > first:
                self._commit_full(sequence)
                if sequence.terms.hand_over:
                    self._announce(sequence, first, changes, end)
            if row.sample is not None:
                self._take(sequence, next(sampled), row.sample.position, changes, end)

    def _run(self, rows: tuple[Row, ...]) -> list[Sampled]:
        samples = self._executor.run(StepPlan(rows))
        asked = [row.seq_id for row in rows if row.sample is not None]
        if [sample.seq_id for sample in samples] != asked:
            raise InternalError("the executor's samples are not those that were asked for")
        return samples

    def _take(self, sequence: Sequence, sample: Sampled, position: int, changes: _Changes, end: float) -> None:
        """A new token of a sequence, which may be its last here."""
        reason = sequence.append(sample.token_id)
        changes.tokens.append(TokenEvent(sequence.key, position, sample.token_id, sample.logprob, sample.top_logprobs, reason))
        if not sequence.reported:
            changes.prefilled.append(self._report(sequence, reason, end))
        if reason is not None or sequence.terms.hand_over:
            self._drop(sequence)

    def _report(self, sequence: Sequence, reason: FinishReason | None, end: float) -> Prefilled:
        sequence.reported = True
        assert sequence.first_scheduled is not None
        queue_s, prefill_s = sequence.first_scheduled - sequence.arrived, end - sequence.first_scheduled
        closing = Closing(sequence.computed, (sequence.tokens[-1],), reason is not None, prefill_s)
        partial = self._lease_partial(sequence, end) if sequence.terms.hand_over else None
        return Prefilled(sequence.key, closing, partial, AttemptTiming(queue_s, prefill_s), sequence.cached_tokens)

    def _lease_partial(self, sequence: Sequence, end: float) -> BlockRecord | None:
        index, tokens = divmod(sequence.computed, self._block_size)
        if not tokens:
            return None
        block = sequence.blocks[index]
        self._inventory.lease(sequence.key, [block], end + sequence.terms.lease_s)
        return BlockRecord(index, b"", block, self._inventory.generation(block), self._inventory.digest(block), tokens)

    def _commit_full(self, sequence: Sequence) -> None:
        """Makes the full blocks findable. One that another sequence computed first takes the place of ours."""
        first, full = sequence.committed_blocks, sequence.computed // self._block_size
        keys, tenant = sequence.keys_until(full, self._block_size), sequence.item.cache_salt
        swapped = self._inventory.commit_run(sequence.blocks, keys, first, full, tenant=tenant, shared=sequence.shared)
        sequence.committed_blocks = full
        if swapped:
            self._executor.forget(sequence.seq_id)

    def _announce(self, sequence: Sequence, first: int, changes: _Changes, now: float) -> None:
        """Leases committed blocks from index `first` on to the attempt, then names them."""
        inventory, blocks = self._inventory, sequence.blocks[first : sequence.committed_blocks]
        inventory.lease(sequence.key, blocks, now + sequence.terms.lease_s)
        records = [
            BlockRecord(i, sequence.keys[i], block, inventory.generation(block), inventory.digest(block), self._block_size)
            for i, block in enumerate(blocks, first)
        ]
        changes.committed.append(Committed(sequence.key, tuple(records)))

    def _fail(self, sequence: Sequence, changes: _Changes, message: str, *, late: bool = False) -> None:
        self._abandon(sequence)
        changes.failed.append(Failed(sequence.key, message, late))

    def _abandon(self, sequence: Sequence) -> None:
        """Drops a sequence that was not handed over, with what it had leased for that."""
        if sequence.terms.hand_over:
            self._inventory.end(sequence.key)
        self._drop(sequence)

    def _drop(self, sequence: Sequence) -> None:
        del self._sequences[sequence.key]
        self._scheduler.remove(sequence)
        self._inventory.release(sequence.evict())
        self._executor.forget(sequence.seq_id)
        self._left.append(sequence.key)
