"""The counted loop against the shipped one: the same story gives the same tokens at the same times, and the same memory."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rigs import item_of, worker_of

from core.request import WorkerRole
from router import events as ev
from sim.workload import Arrival

STORY = st.lists(
    st.tuples(
        st.floats(0, 1.5),  # arrives
        st.integers(1, 40),  # prompt
        st.integers(1, 24),  # answer
        st.integers(0, 2),  # whose first block it shares
        st.one_of(st.none(), st.floats(0.0, 1.0)),  # cancelled so long after
        st.booleans(),  # its max_tokens is its length, or more
    ),
    min_size=1,
    max_size=10,
)


def told(engine: str, role: WorkerRole, num_blocks: int, story: list[Any]) -> tuple[Any, ...]:
    """Everything a router hears of it, token by token, and what is in memory in the end."""
    worker, ear = worker_of(engine, role, num_blocks)
    events = worker.site.events
    for number, (at, asked, answered, shared, cancel_s, open_end) in enumerate(story):
        names = (shared, *(100 * number + n for n in range(1, -(-asked // 8))))
        item = item_of(worker, Arrival(at, asked, answered, names, 8), number, most=answered + 5 * open_end)
        events.at(at, worker.command, ear, ev.SendGenerateLocal(worker.name, item))
        if cancel_s is not None:
            events.at(at + cancel_s, worker.command, ear, ev.SendCancel(worker.name, item.key))
    events.run(until=100)
    tokens, others = [], []
    for when, request, event in ear.said:
        if isinstance(event, ev.Tokens):
            tokens += [(t.logprob, request, t.position, t.finish_reason) for t in event.tokens]
        elif isinstance(event, ev.PrefillDone):
            others.append((request, "computed", event.timing, event.cached_tokens))
        elif isinstance(event, ev.AttemptFailed):
            others.append((when, request, event.error.code))
    worker.check()
    assert len(worker.table) == 0, "an attempt never ended"
    return sorted(tokens, key=lambda token: token[:3]), others, worker.inventory.counts()


@pytest.mark.parametrize("role", [WorkerRole.COLOCATED, WorkerRole.DECODE], ids=lambda role: role.value)
@settings(max_examples=60, deadline=None)
@given(story=STORY, num_blocks=st.integers(16, 40))
def test_the_same_story_has_the_same_tokens_at_the_same_times(role, story, num_blocks):
    counted, exact = told("counted", role, num_blocks, story), told("exact", role, num_blocks, story)
    assert [token[1:] for token in counted[0]] == [token[1:] for token in exact[0]]
    assert [token[0] for token in counted[0]] == pytest.approx([token[0] for token in exact[0]])
    assert len(counted[1]) == len(exact[1])
    assert counted[2] == exact[2]


def test_steps_are_taken_together_where_nothing_changes():
    worker, ear = worker_of("counted", WorkerRole.COLOCATED, 200)
    item = item_of(worker, Arrival(0.0, 8, 40), 0)
    worker.command(ear, ev.SendGenerateLocal(worker.name, item))
    worker.site.events.run(until=100)
    tokens = sum(len(event.tokens) for *_, event in ear.said if isinstance(event, ev.Tokens))
    assert tokens == 40
    assert worker.site.events.count < 20
