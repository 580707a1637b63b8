"""The step loop, one promise at a time."""

from __future__ import annotations

import pytest

from core.request import AttemptKey, FinishReason
from decode_worker.role import DecodeRole
from prefill_worker.role import PrefillRole
from worker.colocated import ColocatedRole

A = AttemptKey("a", 0)


def test_a_request_alone_gets_its_tokens_in_order(bench, item, expected) -> None:
    b, a = bench(), item("a", range(1, 10), max_tokens=20)
    seen = b.serve([a])
    assert seen.tokens[A] == expected(a)
    assert [e.position for o in seen.outputs for e in o.tokens] == list(range(20))
    assert seen.finish == {A: FinishReason.LENGTH}
    assert seen.left == [A]
    b.assert_nothing_held()


def test_a_batch_changes_nobodys_tokens(bench, item, expected) -> None:
    items = [item(f"r{n}", range(n, 3 * n + 2), max_tokens=5 + n, choice=n % 3) for n in range(10)]
    b = bench()
    seen = b.serve(items)
    assert {i.key: expected(i) for i in items} == dict(seen.tokens)
    assert max(len(plan) for plan in b.executor.plans) > 4, "they ran one after another"
    b.assert_nothing_held()


def test_no_step_exceeds_its_token_budget_and_streams_go_on_beside_prompts(bench, item, expected) -> None:
    b = bench()
    short, long = item("s", [1, 2], max_tokens=12), item("l", range(3, 60), max_tokens=2)
    b.loop.submit(short, b.now)
    b.step()
    b.loop.submit(long, b.now)
    while not b.seen.tokens[long.key]:
        before = len(b.seen.tokens[short.key])
        b.step()
        assert len(b.seen.tokens[short.key]) == before + 1, "the prompt held up a stream"
    assert all(sum(n for _, n in plan) <= 16 for plan in b.executor.plans)
    assert [n for plan in b.executor.plans for s, n in plan if s == 1][:4] == [15, 15, 15, 12]
    seen = b.drain()
    assert seen.tokens[short.key] == expected(short)
    assert seen.tokens[long.key] == expected(long)


def test_prompts_are_computed_first_come_first_served(bench, item) -> None:
    b = bench()
    b.serve([item(f"r{n}", range(n, n + 24), max_tokens=1) for n in range(4)])
    first_tokens = [e.key.request_id for o in b.seen.outputs for e in o.tokens]
    assert first_tokens == ["r0", "r1", "r2", "r3"]


def test_a_stop_id_ends_a_request_unless_eos_is_ignored(bench, item, expected) -> None:
    free = item("free", range(5), max_tokens=30)
    stop_at = expected(free)[6]
    first = expected(free).index(stop_at)
    by_eos = item("eos", range(5), max_tokens=30, eos=(stop_at,))
    by_id = item("id", range(5), max_tokens=30, stop_token_ids=(stop_at,))
    ignoring = item("ign", range(5), max_tokens=30, eos=(stop_at,), ignore_eos=True)
    seen = bench().serve([by_eos, by_id, ignoring])
    assert seen.finish[by_eos.key] is seen.finish[by_id.key] is FinishReason.STOP
    assert seen.tokens[by_eos.key] == seen.tokens[by_id.key] == expected(free)[: first + 1]
    assert seen.finish[ignoring.key] is FinishReason.LENGTH
    assert seen.tokens[ignoring.key] == expected(free)


def test_a_continued_request_goes_on_where_it_was(bench, item, expected) -> None:
    whole = item("a", range(9), max_tokens=12)
    done = expected(whole)[:5]
    seen = bench().serve([item("a", range(9), max_tokens=12, generated=done, attempt=1)])
    assert seen.tokens[AttemptKey("a", 1)] == expected(whole)[5:]
    assert [e.position for o in seen.outputs for e in o.tokens] == list(range(5, 12))


def test_a_second_prompt_finds_the_prefix_of_the_first(bench, item, expected) -> None:
    b = bench(max_step_tokens=64)
    b.serve([item("a", range(20), max_tokens=1)])
    b.executor.plans.clear()
    again = item("b", [*range(18), 50, 51], max_tokens=3)
    seen = b.serve([again])
    assert b.executor.plans[0] == [(1, 4)], "16 tokens were resident"
    assert seen.tokens[again.key] == expected(again)
    assert seen.outputs[-3].prefilled[0].cached_tokens == 16


def test_a_whole_prompt_in_the_cache_still_computes_its_last_block(bench, item, expected) -> None:
    b = bench(max_step_tokens=64)
    first, again = item("a", range(16), max_tokens=3), item("b", range(16), max_tokens=3)
    b.serve([first])
    b.executor.plans.clear()
    assert b.serve([again]).tokens[again.key] == expected(again)
    assert b.executor.plans[0] == [(1, 4)]
    assert 1 in b.executor.forgotten, "its block was exchanged for the resident one"
    b.assert_nothing_held()


def test_the_next_turn_finds_generated_tokens_too(bench, item, expected) -> None:
    b = bench(max_step_tokens=64)
    first = item("a", range(6), max_tokens=11)
    b.serve([first])
    b.executor.plans.clear()
    turn = item("b", [*range(6), *expected(first), 40], max_tokens=1)
    b.serve([turn])
    assert b.executor.plans[0] == [(1, 18 - 16)]


def test_tenants_do_not_share_and_neither_does_a_loop_without_prefix_cache(bench, item) -> None:
    for b, salts in ((bench(max_step_tokens=64), (b"x", b"y")), (bench(max_step_tokens=64, prefix_cache=False), (b"", b""))):
        b.serve([item("a", range(16), max_tokens=1, salt=salts[0])])
        seen = b.serve([item("b", range(16), max_tokens=1, salt=salts[1])])
        assert [p.cached_tokens for o in seen.outputs for p in o.prefilled] == [0, 0]
        b.assert_nothing_held()


def test_two_equal_prompts_side_by_side_end_up_on_the_same_blocks(bench, item, expected) -> None:
    b = bench(max_step_tokens=64)
    one, two = item("a", range(16), max_tokens=9, choice=0), item("b", range(16), max_tokens=9, choice=1)
    b.loop.submit(one, b.now)
    b.loop.submit(two, b.now)
    b.step()
    assert b.inventory.counts().active == 4
    seen = b.drain()
    assert seen.tokens[one.key] == expected(one)
    assert seen.tokens[two.key] == expected(two) != expected(one)
    b.assert_nothing_held()


def test_timing_counts_waiting_and_computing_apart(bench, item) -> None:
    ticks = iter(range(100, 200))
    b = bench(clock=lambda: float(next(ticks)))
    b.loop.submit(item("a", range(20), max_tokens=1), now=5.0)
    first, second = b.loop.step(7.0), b.loop.step(9.0)
    assert not first.prefilled
    (prefilled,) = second.prefilled
    assert prefilled.timing.queue_s == 2.0
    assert prefilled.timing.prefill_s == prefilled.closing.prefill_s == 101.0 - 7.0
    assert (first.num_tokens, second.num_tokens) == (16, 4)


def test_load_counts_prompt_work_ahead(bench, item) -> None:
    b = bench(max_running=2)
    for n in range(3):
        b.loop.submit(item(f"r{n}", range(n, n + 20)), b.now)
    assert b.loop.load() == (load := b.loop.load())
    assert (load.running, load.waiting, load.waiting_tokens) == (0, 3, 60)
    b.step()
    load = b.loop.load()
    assert (load.running, load.waiting, load.waiting_tokens) == (1, 2, 44)


@pytest.mark.parametrize("prompt_len", [10, 12])
def test_handed_in_kv_is_continued_without_computing_it_again(bench, item, expected, prompt_len) -> None:
    whole = item("a", range(prompt_len), max_tokens=6)
    b = bench(role=DecodeRole())
    arrived = item("a", range(prompt_len), max_tokens=6, generated=expected(whole)[:1])
    b.loop.submit(arrived, b.now, blocks=b.pulled(whole.token_ids), computed_len=prompt_len)
    assert b.inventory.counts().active == 3
    assert b.step().joined == (A,)
    seen = b.drain()
    assert seen.tokens[A] == expected(whole)[1:]
    assert [plan for plan in b.executor.plans if plan != [(0, 1)]] == []
    assert not any(o.prefilled for o in seen.outputs), "nothing was prefilled here"
    b.assert_nothing_held()
    assert b.inventory.counts().cached >= prompt_len // 4, "pulled blocks are findable like computed ones"


def test_handed_in_kv_stays_as_cache_though_it_is_cancelled_before_it_joins(bench, item) -> None:
    b = bench(role=DecodeRole())
    b.loop.submit(item("a", range(10), generated=[5]), b.now, blocks=b.pulled(tuple(range(10))), computed_len=10)
    b.loop.cancel(A)
    assert b.inventory.counts().cached == 2
    b.assert_nothing_held()


def test_handed_in_kv_may_lack_more_than_the_last_token(bench, item, expected) -> None:
    whole = item("a", range(22), max_tokens=6)
    b = bench(role=DecodeRole())
    b.loop.submit(whole, b.now, blocks=b.pulled(whole.token_ids[:8]), computed_len=8)
    assert b.drain().tokens[A] == expected(whole)
    assert b.executor.plans[0] == [(0, 14)]
    b.assert_nothing_held()


def test_hand_overs_join_while_a_prompt_waits_for_memory(bench, item, expected) -> None:
    b = bench(role=DecodeRole(), blocks=8)
    whole = item("a", range(10), max_tokens=3)
    arrived = item("a", range(10), max_tokens=3, generated=expected(whole)[:1])
    blocks = b.pulled(whole.token_ids)
    waits = item("waits", range(20, 44), max_tokens=2)
    b.loop.submit(waits, b.now)
    b.step()
    assert not b.loop.has_work()
    b.loop.submit(arrived, b.now, blocks=blocks, computed_len=10)
    assert b.step().joined == (A,)
    seen = b.drain()
    assert seen.tokens[A] == expected(whole)[1:]
    assert seen.tokens[waits.key] == expected(waits)
    b.assert_nothing_held()


def test_a_stream_of_hand_overs_does_not_keep_an_older_prompt_out(bench, item, expected) -> None:
    b = bench(role=DecodeRole(), max_running=2)
    first = [item(f"first{n}", [n], max_tokens=8) for n in range(2)]
    for i in first:
        b.loop.submit(i, b.now)
    b.step()
    local = item("local", range(50, 55), max_tokens=2)
    b.loop.submit(local, b.now)
    for n in range(8):
        whole = item(f"over{n}", range(10), max_tokens=9, choice=n)
        arrived = item(f"over{n}", range(10), max_tokens=9, choice=n, generated=expected(whole)[:1])
        b.loop.submit(arrived, b.now, blocks=b.pulled(whole.token_ids), computed_len=10)
    seen = b.drain()
    assert seen.left.index(local.key) <= 3
    b.assert_nothing_held()


def test_a_role_changes_while_running_and_everyone_stays_on_their_terms(bench, item, expected) -> None:
    b = bench(role=ColocatedRole())
    stays, goes = item("stays", range(4), max_tokens=12), item("goes", range(20, 40), max_tokens=12)
    b.loop.submit(stays, b.now)
    b.step()
    b.loop.role = PrefillRole(lease_s=100.0)
    b.loop.submit(goes, b.now)
    b.step()
    b.loop.role = DecodeRole()
    seen = b.drain()
    assert seen.tokens[stays.key] == expected(stays)
    assert seen.tokens[goes.key] == expected(goes)[:1]
    assert b.inventory.leases_open() == 1
    b.inventory.end(goes.key)
    b.assert_nothing_held()


def test_streams_do_not_starve_prompts_whatever_the_configuration(bench, item) -> None:
    b = bench(max_running=64, max_step_tokens=16, blocks=400)
    for n in range(20):
        b.loop.submit(item(f"r{n}", [n], max_tokens=50), b.now)
    late = item("late", range(30, 40), max_tokens=1)
    b.loop.submit(late, b.now)
    b.drain()
    assert max(len(plan) for plan in b.executor.plans) == 12
    assert all(len(tokens) == 50 for key, tokens in b.seen.tokens.items() if key != late.key)
    assert len(b.seen.tokens[late.key]) == 1
