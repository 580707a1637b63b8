"""A bench for the step loop: an executor that remembers which token each slot of each block was written for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pytest

from core.blocks import KvLayout, root_key
from core.config import EngineConfig
from core.inventory import Inventory
from core.request import AttemptKey, FinishReason, WorkItem
from engine.loop import StepLoop, StepOutput
from engine.step import Row, Sampled, SampleSpec, StepPlan
from tandem.sampling import SamplingParams
from worker.colocated import ColocatedRole

VOCAB = 97


def mix(*values: int) -> int:
    """A small hash that is the same in every process."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = ((state ^ value) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**64
        state ^= state >> 29
    return state


def next_token(kv: int, sample: SampleSpec) -> int:
    return mix(kv, sample.params.seed or 0, sample.choice, sample.position) % VOCAB


def expected_tokens(item: WorkItem) -> list[int]:
    """What the item must generate, computed without loop, blocks or batch."""
    kv, tokens = 0, list(item.token_ids)
    for token in tokens:
        kv = mix(kv, token)
    while len(tokens) < item.max_len:
        sample = SampleSpec(item.sampling, item.choice, len(tokens) - item.prompt_len, tokens, item.prompt_len)
        token = next_token(kv, sample)
        tokens.append(token)
        kv = mix(kv, token)
        if token in item.stop_ids:
            break
    return tokens[len(item.token_ids) :]


class RememberingExecutor:
    """The KV of a token is a hash over the whole prefix, so a wrong block anywhere before it changes every token after.

    Asserts that a row's blocks hold exactly its sequence's tokens, that nothing findable is written to, and that a block
    table only grows unless it was forgotten; the loop survives what an executor raises, so that `violations` remembers.
    Raises for tokens in `poison`, and `failures` times for anything.
    """

    def __init__(self, inventory: Inventory, num_blocks: int, block_size: int) -> None:
        self.layout = KvLayout(b"fake", "float32", 1, 1, 1, block_size)
        self.num_blocks = num_blocks
        self.inventory = inventory
        self.slots: list[list[tuple[int, int] | None]] = [[None] * block_size for _ in range(num_blocks)]
        self.tables: dict[int, list[int]] = {}
        self.forgotten: list[int] = []
        self.plans: list[list[tuple[int, int]]] = []
        self.poison: set[int] = set()
        self.failures = 0
        self.violations: list[AssertionError] = []

    def run(self, plan: StepPlan) -> list[Sampled]:
        if self.failures:
            self.failures -= 1
            raise RuntimeError("the device is gone")
        self.plans.append([(row.seq_id, len(row.token_ids)) for row in plan.rows])
        try:
            assert len({row.seq_id for row in plan.rows}) == len(plan.rows)
            return [sampled for row in plan.rows if (sampled := self._compute(row))]
        except AssertionError as violation:
            self.violations.append(violation)
            raise

    def forget(self, seq_id: int) -> None:
        self.forgotten.append(seq_id)
        self.tables.pop(seq_id, None)

    def write(self, blocks: list[int], tokens: Iterable[int]) -> None:
        """Puts KV there as a transfer would."""
        kv, size = 0, self.layout.block_size
        for position, token in enumerate(tokens):
            kv = mix(kv, token)
            self.slots[blocks[position // size]][position % size] = (token, kv)

    def _compute(self, row: Row) -> Sampled | None:
        assert row.token_ids
        size = self.layout.block_size
        table = self.tables.setdefault(row.seq_id, [])
        assert list(row.blocks)[: len(table)] == table, "a block table changed behind the executor's back"
        self.tables[row.seq_id] = list(row.blocks)
        held = [self._read(row, position) for position in range(row.start)]
        kv = held[-1][1] if held else 0
        tokens = [token for token, _ in held]
        for position, token in enumerate(row.token_ids, row.start):
            if token in self.poison:
                raise ValueError(f"token {token} cannot be embedded")
            kv = mix(kv, token)
            block = row.blocks[position // size]
            assert self.inventory.key_of(block) is None, "a block that others can find is written to"
            self.slots[block][position % size] = (token, kv)
            tokens.append(token)
        if row.sample is None:
            return None
        assert tokens == list(row.sample.history), "the blocks hold another sequence's tokens"
        return Sampled(row.seq_id, next_token(kv, row.sample), None, ())

    def _read(self, row: Row, position: int) -> tuple[int, int]:
        size = self.layout.block_size
        slot = self.slots[row.blocks[position // size]][position % size]
        assert slot is not None, "KV is read that nobody wrote"
        previous = self.slots[row.blocks[(position - 1) // size]][(position - 1) % size] if position else (0, 0)
        assert previous is not None
        assert slot[1] == mix(previous[1], slot[0]), "KV of another prefix"
        return slot


@dataclass
class Seen:
    """Everything a loop has put out."""

    tokens: dict[AttemptKey, list[int]] = field(default_factory=lambda: defaultdict(list))
    finish: dict[AttemptKey, FinishReason] = field(default_factory=dict)
    outputs: list[StepOutput] = field(default_factory=list)
    left: list[AttemptKey] = field(default_factory=list)
    given_back: list[AttemptKey] = field(default_factory=list)
    failed: dict[AttemptKey, str] = field(default_factory=dict)

    def add(self, output: StepOutput) -> StepOutput:
        self.outputs.append(output)
        for event in output.tokens:
            assert event.key not in self.finish, "a token after the last"
            self.tokens[event.key].append(event.token_id)
            if event.finish_reason is not None:
                self.finish[event.key] = event.finish_reason
        self.left += output.left
        self.given_back += [given.key for given in output.given_back]
        self.failed |= {failed.key: failed.message for failed in output.failed}
        return output


class Bench:
    """One loop with its inventory and executor, and all it has said so far."""

    def __init__(self, role=None, blocks: int = 64, block_size: int = 4, clock: Callable[[], float] | None = None, **config):
        self.inventory = Inventory(blocks)
        self.executor = RememberingExecutor(self.inventory, blocks, block_size)
        self.config = EngineConfig(block_size=block_size, **{"max_step_tokens": 16, **config})
        self.loop = StepLoop(
            self.config, role or ColocatedRole(), self.inventory, self.executor, lambda salt: root_key(b"fake", salt), clock
        )
        self.seen = Seen()
        self.now = 0.0

    def step(self) -> StepOutput:
        self.now += 1.0
        output = self.seen.add(self.loop.step(self.now))
        self.loop.check()
        assert not self.executor.violations
        return output

    def drain(self, steps_max: int = 2000) -> Seen:
        for _ in range(steps_max):
            if not self.loop.has_work():
                return self.seen
            self.step()
        raise AssertionError(f"still at work after {steps_max} steps")

    def serve(self, items: Iterable[WorkItem]) -> Seen:
        for item in items:
            self.loop.submit(item, self.now)
        return self.drain()

    def pulled(self, tokens: tuple[int, ...]) -> list[int]:
        """Blocks holding the KV of `tokens`, as a decode worker has after pulling."""
        blocks = self.inventory.allocate(-(-len(tokens) // self.executor.layout.block_size))
        self.executor.write(blocks, tokens)
        return blocks

    def assert_nothing_held(self) -> None:
        self.loop.check()
        assert self.inventory.leases_open() == 0
        assert self.inventory.counts().active == 0
        assert not self.executor.tables, "the executor still remembers a sequence that left"


def make_item(
    name: str, prompt: Iterable[int], max_tokens: int = 8, *, generated: Iterable[int] = (), attempt: int = 0, choice: int = 0,
    eos: tuple[int, ...] = (), salt: bytes = b"", remaining_s: float = 0.0, **sampling,
) -> WorkItem:  # fmt: skip
    prompt = tuple(prompt)
    params = SamplingParams(**{"max_tokens": max_tokens, "seed": 1, **sampling})
    key = AttemptKey(name, attempt)
    return WorkItem(key, (*prompt, *generated), len(prompt), params, choice, eos, salt, remaining_s)


@pytest.fixture
def bench() -> type[Bench]:
    return Bench


@pytest.fixture
def item() -> Callable[..., WorkItem]:
    return make_item


@pytest.fixture
def expected() -> Callable[[WorkItem], list[int]]:
    return expected_tokens
