"""The step loop when things go wrong: refusals, cancels, deadlines, too little memory, a failing executor."""

from __future__ import annotations

import pytest

from core.errors import InternalError, InvalidRequestError, OverloadedError
from core.request import AttemptKey
from decode_worker.role import DecodeRole
from prefill_worker.role import PrefillRole

A = AttemptKey("a", 0)


@pytest.mark.parametrize(
    ("prompt_len", "max_tokens", "message"),
    [(10, 55, r"needs KV memory for 65 tokens and this worker has 64: shorten the prompt, lower max_tokens")],
)
def test_what_can_never_fit_is_refused(bench, item, prompt_len, max_tokens, message) -> None:
    b = bench(blocks=16)
    with pytest.raises(InvalidRequestError, match=message):
        b.loop.submit(item("a", range(prompt_len), max_tokens=max_tokens), b.now)
    assert not b.loop.has_work()
    b.serve([item("a", range(10), max_tokens=54)])
    b.assert_nothing_held()


def test_other_refusals(bench, item) -> None:
    b = bench(max_waiting=2)
    with pytest.raises(InvalidRequestError, match="has all its 2 tokens"):
        b.loop.submit(item("a", [1], max_tokens=2, generated=[4, 5]), b.now)
    b.loop.submit(item("a", [1]), b.now)
    with pytest.raises(InvalidRequestError, match="already here"):
        b.loop.submit(item("a", [1]), b.now)
    b.loop.submit(item("b", [1]), b.now)
    with pytest.raises(OverloadedError, match=r"2 requests wait here already; retry later") as refused:
        b.loop.submit(item("c", [1]), b.now)
    assert refused.value.retry_after_s
    assert b.loop.load().waiting == 2


def test_refused_blocks_stay_the_callers(bench, item) -> None:
    b = bench(role=PrefillRole(lease_s=5.0))
    blocks = b.inventory.allocate(1)
    with pytest.raises(InvalidRequestError, match="decode worker"):
        b.loop.submit(item("a", [1, 2]), b.now, blocks=blocks, computed_len=1)
    assert b.inventory.counts().active == 1
    b.inventory.release(blocks)
    b.assert_nothing_held()


@pytest.mark.parametrize("steps", [0, 1, 2, 4, 6])
def test_a_cancel_frees_everything_at_once(bench, item, expected, steps) -> None:
    b = bench()
    b.loop.submit(item("a", range(30), max_tokens=20), b.now)
    other = item("b", range(3), max_tokens=4)
    b.loop.submit(other, b.now)
    for _ in range(steps):
        b.step()
    b.loop.cancel(A)
    b.loop.cancel(A)
    b.loop.cancel(AttemptKey("never seen", 3))
    assert b.loop.has_work()
    assert A in b.step().left
    seen = b.drain()
    assert seen.left.count(A) == 1
    assert A not in seen.finish
    assert seen.tokens[other.key] == expected(other)
    b.assert_nothing_held()


def test_who_waits_past_its_deadline_fails_without_being_computed(bench, item) -> None:
    b = bench(max_running=1)
    late = item("late", [1, 2], remaining_s=3.0)
    b.serve([item("a", [1], max_tokens=9), late])
    assert "deadline" in b.seen.failed[late.key]
    assert [failed.late for o in b.seen.outputs for failed in o.failed] == [True]
    assert b.seen.left == [A, late.key]
    assert late.key not in b.seen.tokens
    b.assert_nothing_held()


def test_no_work_while_memory_is_held_elsewhere_and_work_again_once_it_is_freed(bench, item, expected) -> None:
    b, a = bench(blocks=8), item("a", range(9), max_tokens=4)
    elsewhere = b.inventory.allocate(7)
    b.loop.submit(a, b.now)
    assert b.loop.has_work()
    b.step()
    assert not b.loop.has_work(), "the worker would spin"
    b.inventory.release(elsewhere[:1])
    assert b.loop.has_work()
    b.step()
    assert not b.loop.has_work()
    b.inventory.release(elsewhere[1:])
    assert b.drain().tokens[A] == expected(a)
    b.assert_nothing_held()


def test_cancelling_the_blocked_head_lets_the_next_in(bench, item) -> None:
    b = bench(blocks=8)
    elsewhere = b.inventory.allocate(6)
    small = item("small", [1, 2], max_tokens=2)
    b.loop.submit(item("a", range(12), max_tokens=4), b.now)
    b.loop.submit(small, b.now)
    b.step()
    b.loop.cancel(A)
    assert len(b.drain().tokens[small.key]) == 2
    b.inventory.release(elsewhere)
    b.assert_nothing_held()


def test_short_of_memory_a_colocated_worker_recomputes_its_youngest(bench, item, expected) -> None:
    b = bench(blocks=12, max_step_tokens=64)
    items = [item(f"r{n}", range(n * 10, n * 10 + 8), max_tokens=30) for n in range(4)]
    seen = b.serve(items)
    assert {i.key: expected(i) for i in items} == dict(seen.tokens)
    assert b.executor.forgotten.count(0) == 1, "the oldest never gives way"
    assert len(b.executor.forgotten) > 4, "memory was never short"
    assert sorted(seen.left) == sorted(i.key for i in items)
    assert sum(len(o.prefilled) for o in seen.outputs) == 4, "a prefill is reported once"
    b.assert_nothing_held()


def test_short_of_memory_a_decode_worker_gives_its_youngest_back(bench, item, expected) -> None:
    b = bench(role=DecodeRole(), blocks=12, max_step_tokens=64)
    items = [item(f"r{n}", range(n * 10, n * 10 + 8), max_tokens=30) for n in range(3)]
    seen = b.serve(items)
    assert seen.given_back
    assert items[0].key not in seen.given_back
    assert sorted(seen.left) == sorted(i.key for i in items)
    for i in items:
        got = seen.tokens[i.key]
        assert got == expected(i)[: len(got)]
        assert (i.key in seen.finish) == (i.key not in seen.given_back)
    b.assert_nothing_held()


def test_a_request_that_breaks_the_executor_fails_alone(bench, item, expected) -> None:
    b = bench()
    b.executor.poison = {90}
    good, bad = item("good", range(6), max_tokens=9), item("bad", [1, 90], max_tokens=9)
    b.executor.poison -= set(expected(good))
    seen = b.serve([good, bad])
    assert seen.tokens[good.key] == expected(good)
    assert "ValueError: token 90 cannot be embedded" in seen.failed[bad.key]
    assert sorted(seen.left) == [bad.key, good.key]
    b.assert_nothing_held()


def test_a_passing_failure_costs_nothing(bench, item, expected) -> None:
    b, a = bench(), item("a", range(6))
    b.executor.failures = 1
    assert b.serve([a]).tokens[A] == expected(a)
    assert not b.seen.failed
    assert b.executor.forgotten == [0, 0], "it may have held half a step"
    b.assert_nothing_held()


def test_an_executor_that_keeps_failing_surfaces(bench, item) -> None:
    b = bench()
    b.executor.failures = 100
    for n in range(2):
        b.loop.submit(item(f"r{n}", [n]), b.now)
        assert b.step().failed
    b.loop.submit(item("r2", [2]), b.now)
    with pytest.raises(InternalError, match="3 steps failed in a row, the last with RuntimeError"):
        b.step()
    b.assert_nothing_held()
