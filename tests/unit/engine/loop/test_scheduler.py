"""Who gets tokens and blocks in the next step: tables over small queues."""

from __future__ import annotations

import pytest

from core.blocks import root_key
from core.config import EngineConfig
from core.inventory import Inventory
from decode_worker.role import DecodeRole
from engine.role import Terms
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from prefill_worker.role import PrefillRole
from worker.colocated import ColocatedRole


class Queues:
    def __init__(self, item, blocks=64, **config) -> None:
        self.item = item
        self.inventory = Inventory(blocks)
        config = EngineConfig(block_size=4, **{"max_step_tokens": 40, "max_running": 8, **config})
        self.scheduler = Scheduler(config, self.inventory, 4)
        self.sequences: list[Sequence] = []

    def new(self, length: int, hand_over: bool = False) -> Sequence:
        n = len(self.sequences)
        item = self.item(f"r{n}", [n * 100 + i for i in range(length)], max_tokens=50)
        self.sequences.append(Sequence(n, item, Terms(hand_over), root_key(b""), 0.0))
        return self.sequences[-1]

    def wait(self, *lengths: int) -> None:
        self.scheduler.waiting.extend(self.new(length) for length in lengths)

    def decode(self, length: int) -> None:
        s = self.new(length)
        s.place(self.inventory.allocate(s.missing_blocks(4)), length - 1)
        self.scheduler.running.append(s)

    def ready(self, length: int) -> None:
        s = self.new(length)
        s.place(self.inventory.allocate(s.missing_blocks(4)), length - 1)
        self.scheduler.ready.append(s)

    def plan(self, role=None):
        schedule = self.scheduler.schedule(role or ColocatedRole(), 0.0)
        for sequence, count in schedule.work:
            sequence.computed += count
        return [(s.seq_id, count) for s, count in schedule.work], schedule


@pytest.fixture
def queues(item):
    return lambda **kwargs: Queues(item, **kwargs)


@pytest.mark.parametrize(
    ("role", "expected"),
    [
        (ColocatedRole(), [(0, 1), (1, 1), (2, 38)]),
        (PrefillRole(1.0), [(0, 1), (1, 1), (2, 38)]),
        (DecodeRole(chunk_tokens=6), [(0, 1), (1, 1), (2, 6)]),
    ],
)
def test_streams_come_first_and_the_role_says_how_much_prompt_beside_them(queues, role, expected) -> None:
    q = queues()
    q.decode(5)
    q.decode(9)
    q.wait(60)
    assert q.plan(role)[0] == expected


def test_a_decode_worker_without_streams_computes_prompts_at_full_speed(queues) -> None:
    q = queues()
    q.wait(60)
    assert q.plan(DecodeRole(chunk_tokens=6))[0] == [(0, 40)]


def test_chunks_go_to_the_oldest_prompt_and_the_rest_to_the_next(queues) -> None:
    q = queues()
    q.wait(50, 20, 20)
    assert q.plan()[0] == [(0, 40)]
    assert q.plan()[0] == [(0, 10), (1, 20), (2, 10)]
    assert [s.seq_id for s in q.scheduler.running] == [0, 1, 2]


def test_a_prompt_is_admitted_only_when_there_is_budget_for_it(queues) -> None:
    q = queues()
    q.wait(40, 8)
    q.plan()
    assert [s.seq_id for s in q.scheduler.running] == [0], "later it may find more of its prefix in the cache"


def test_no_one_overtakes_the_head_that_lacks_memory(queues) -> None:
    q = queues(blocks=10)
    q.decode(17)
    q.wait(20, 4)
    work, schedule = q.plan()
    assert work == [(0, 1)]
    assert not schedule.admitted
    assert q.inventory.counts().free == 5


def test_admission_leaves_every_stream_a_block_to_grow(queues) -> None:
    for length, admitted in ((16, 1), (17, 0)):
        q = queues(blocks=10)
        for _ in range(2):
            q.decode(8)
        q.wait(length)
        assert len(q.plan()[1].admitted) == admitted


def test_the_youngest_gives_way_and_nobody_enters_in_that_step(queues) -> None:
    q = queues(blocks=12)
    q.decode(8)
    q.decode(8)
    q.decode(32)
    for s in q.sequences:
        s.computed += 1
        s.tokens.append(1)  # each needs one more block now, and there is none
    q.wait(2)
    work, schedule = q.plan()
    assert [s.seq_id for s in schedule.victims] == [2]
    assert work == [(0, 1), (1, 1)]
    assert not schedule.admitted
    q.scheduler.requeue(schedule.victims[0])
    assert [s.seq_id for s in q.scheduler.waiting] == [2, 3]


def test_running_is_capped_below_the_budget_of_a_step(queues) -> None:
    q = queues(max_step_tokens=16, max_running=100)
    for _ in range(20):
        q.ready(3)
    q.wait(30)
    work, schedule = q.plan()
    assert len(schedule.joined) == 12
    assert len(work) == 12


def test_the_batch_is_capped(queues) -> None:
    q = queues(max_running=3)
    q.wait(2, 2, 2, 2)
    assert q.plan()[0] == [(0, 2), (1, 2), (2, 2)]


def test_a_place_is_kept_for_the_older_prompt(queues) -> None:
    q = queues(max_running=2)
    q.wait(5)
    q.ready(3)
    q.ready(3)
    work, schedule = q.plan()
    assert work == [(1, 1), (0, 5)]
    assert [s.seq_id for s in schedule.joined] == [1]
