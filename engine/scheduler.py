"""Which sequences compute how many tokens in the next step, and who gets the blocks for it.

First come, first served, and never starving: running sequences are capped below the step's token budget, so every
stream gets its token in every step and at least a quarter of the budget stays for prompts, oldest first. A sequence is
admitted only when all its tokens fit, with a block to spare for every stream that still grows; when memory runs out all
the same, the youngest gives way. (Continuous batching after Orca, chunked prefill after Sarathi-Serve.)
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass, field
from operator import attrgetter

from core.blocks import blocks_for
from core.config import EngineConfig
from core.errors import OutOfBlocksError
from core.inventory import Inventory
from engine.role import Role
from engine.sequence import Sequence

_BY_AGE = attrgetter("seq_id")


@dataclass(slots=True)
class Schedule:
    """What one step will do: tokens per sequence, and who changed state on the way."""

    work: list[tuple[Sequence, int]] = field(default_factory=list)
    joined: list[Sequence] = field(default_factory=list)  # with KV handed in
    admitted: list[Sequence] = field(default_factory=list)  # cached_tokens of them found resident
    victims: list[Sequence] = field(default_factory=list)  # out of the running, their blocks released
    late: list[Sequence] = field(default_factory=list)  # deadline passed while waiting


class Scheduler:
    """Owns the queues: `waiting` without KV, `ready` with KV handed in, `running` by age. Not thread-safe."""

    def __init__(self, config: EngineConfig, inventory: Inventory, block_size: int) -> None:
        self.waiting: deque[Sequence] = deque()
        self.ready: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._inventory = inventory
        self._block_size = block_size
        self._prefix_cache = config.prefix_cache
        self._step_tokens = config.max_step_tokens
        self._rows_max = min(config.max_running, config.max_step_tokens * 3 // 4)
        self._blocked_at: int | None = None  # blocks to be had when the head of `waiting` last did not fit

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out of whichever queue holds it, if any; its blocks are the caller's to release."""
        self._blocked_at = None
        for queue in (self.running, self.ready, self.waiting):
            if sequence in queue:
                queue.remove(sequence)
                return

    def requeue(self, sequence: Sequence) -> None:
        """Puts a victim back where its age belongs: before everything that waits and is younger."""
        behind = next((i for i, other in enumerate(self.waiting) if other.seq_id > sequence.seq_id), len(self.waiting))
        self.waiting.insert(behind, sequence)
        self._blocked_at = None

    def runnable(self) -> bool:
        """Whether a step would get anywhere; turns true without our doing when another thread frees blocks."""
        return bool(self.running or self.ready or (self.waiting and not self._blocked()))

    def schedule(self, role: Role, now: float) -> Schedule:
        plan = Schedule()
        self._join(plan)
        self._grow(plan)
        decoding = [sequence for sequence in self.running if sequence.pending == 1]
        plan.work += [(sequence, 1) for sequence in decoding]
        left = self._step_tokens - len(decoding)
        prefilling = self.running if len(decoding) < len(self.running) else ()
        if left > 0 and (prefilling or self.waiting):
            self._prefill(plan, min(left, role.prefill_tokens(left, len(decoding))), now)
        return plan

    def _join(self, plan: Schedule) -> None:
        """Hand-overs already hold memory, so they go first; but an older sequence that could start keeps its place."""
        while self.ready:
            older_waits = bool(self.waiting) and self.waiting[0].seq_id < self.ready[0].seq_id and not self._blocked()
            if len(self.running) + older_waits >= self._rows_max:
                return
            sequence = self.ready.popleft()
            insort(self.running, sequence, key=_BY_AGE)
            plan.joined.append(sequence)

    def _grow(self, plan: Schedule) -> None:
        """A block for every running sequence whose next tokens need one, oldest first, from the youngest if need be."""
        block_size, running = self._block_size, self.running
        i = 0
        while i < len(running):
            sequence = running[i]
            if len(sequence.tokens) <= len(sequence.blocks) * block_size:
                i += 1
                continue
            try:
                sequence.blocks += self._inventory.allocate(sequence.missing_blocks(block_size))
            except OutOfBlocksError:
                self._give_way(plan, running.pop())

    def _give_way(self, plan: Schedule, victim: Sequence) -> None:
        """Frees a victim's blocks at once, for the one they are needed for; what was announced of it is revoked."""
        self._inventory.release(victim.evict())
        if victim.terms.hand_over:
            self._inventory.end(victim.key)
        if victim in plan.joined:
            plan.joined.remove(victim)
        plan.victims.append(victim)

    def _prefill(self, plan: Schedule, left: int, now: float) -> None:
        for sequence in self.running:
            if left and sequence.pending > 1:
                left -= self._chunk(plan, sequence, left)
        if plan.victims:
            return  # they are older than what waits
        while left and self.waiting and len(self.running) < self._rows_max and not self._blocked():
            sequence = self.waiting[0]
            if sequence.deadline <= now:
                plan.late.append(self.waiting.popleft())
                continue
            if not self._admit(sequence):
                return
            self.waiting.popleft()
            insort(self.running, sequence, key=_BY_AGE)
            plan.admitted.append(sequence)
            left -= self._chunk(plan, sequence, left)

    @staticmethod
    def _chunk(plan: Schedule, sequence: Sequence, left: int) -> int:
        count = min(left, sequence.pending)
        plan.work.append((sequence, count))
        return count

    def _admit(self, sequence: Sequence) -> bool:
        """Places a waiting sequence on what the cache has of it and on fresh blocks for the rest, or changes nothing."""
        size = self._block_size
        found: list[int] = []
        if self._prefix_cache:
            whole = (len(sequence.tokens) - 1) // size  # one token at least is computed, for its logits
            found = self._inventory.match(sequence.keys_until(whole, size))
        needed = blocks_for(len(sequence.tokens), size) - len(found)
        spare = sum(not other.terms.hand_over for other in self.running)
        try:
            if needed + spare > self._available():
                raise OutOfBlocksError("streams in progress need room to grow")
            blocks = found + self._inventory.allocate(needed)
        except OutOfBlocksError:
            self._inventory.release(found)
            self._blocked_at = self._available()
            return False
        sequence.place(blocks, len(found) * size)
        sequence.committed_blocks = len(found)
        if sequence.first_scheduled is None:
            sequence.cached_tokens = len(found) * size
        return True

    def _blocked(self) -> bool:
        """The head of `waiting` did not fit and nothing was freed since. The empty engine is never blocked by itself:
        what can never fit was refused at the door, and blocks held elsewhere are freed sooner or later."""
        if self._blocked_at is not None and self._available() > self._blocked_at:
            self._blocked_at = None
        return self._blocked_at is not None

    def _available(self) -> int:
        counts = self._inventory.counts()
        return counts.free + counts.cached
