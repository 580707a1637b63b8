"""What a prefill role's loop leaves behind for whoever decodes."""

from __future__ import annotations

import pytest

from core.blocks import block_keys, root_key
from core.request import AttemptKey, FinishReason
from decode_worker.role import DecodeRole
from prefill_worker.role import PrefillRole

A = AttemptKey("a", 0)


def records_of(seen, key=A):
    return [record for o in seen.outputs for c in o.committed if c.key == key for record in c.records]


def test_blocks_are_announced_as_they_are_computed_and_leased_before_they_are_let_go(bench, item, expected) -> None:
    b, a = bench(role=PrefillRole(lease_s=5.0)), item("a", range(38), max_tokens=9)
    b.loop.submit(a, b.now)
    counts = [len(b.step().committed[0].records) for _ in range(3)]
    assert counts == [4, 4, 1]
    (prefilled,) = b.seen.outputs[-1].prefilled
    assert prefilled.closing.num_tokens == 38
    assert prefilled.closing.generated == tuple(expected(a)[:1])
    assert not prefilled.closing.finished
    assert b.seen.left == [A]
    assert not b.loop.has_work()
    records = records_of(b.seen)
    assert [r.index for r in records] == list(range(9))
    assert [r.key for r in records] == block_keys(root_key(b"fake"), range(38), 4)
    assert {r.num_tokens for r in records} == {4}
    partial = prefilled.partial
    assert (partial.index, partial.key, partial.num_tokens) == (9, b"", 2)
    assert b.inventory.counts().active == 10
    assert all(b.inventory.generation(r.block_id) == r.generation for r in [*records, partial])
    assert b.inventory.expire(b.now + 4.9) == []
    assert b.inventory.expire(b.now + 5.0) == [A]
    assert b.inventory.generation(partial.block_id) != partial.generation
    b.assert_nothing_held()


def test_a_prompt_of_whole_blocks_has_no_partial_one(bench, item) -> None:
    b = bench(role=PrefillRole(lease_s=5.0))
    (prefilled,) = b.serve([item("a", range(8))]).outputs[-1].prefilled
    assert prefilled.partial is None
    assert b.inventory.counts().active == 2
    b.inventory.end(A)
    b.assert_nothing_held()


def test_a_cached_prefix_is_announced_before_anything_is_computed(bench, item, expected) -> None:
    b = bench(role=PrefillRole(lease_s=5.0))
    b.serve([item("warm", range(12), max_tokens=1)])
    b.inventory.end(AttemptKey("warm", 0))
    b.executor.plans.clear()
    a = item("a", [*range(12), *range(50, 60)])
    b.loop.submit(a, b.now)
    output = b.step()
    assert [r.index for r in output.committed[0].records] == [0, 1, 2]
    assert not b.executor.plans
    output = b.step()
    assert [r.index for r in output.committed[0].records] == [3, 4]
    assert output.prefilled[0].cached_tokens == 12
    assert b.seen.tokens[A] == expected(a)[:1]
    b.inventory.end(A)
    b.assert_nothing_held()


def test_known_digests_travel_with_the_records(bench, item) -> None:
    b = bench(role=PrefillRole(lease_s=5.0))
    b.serve([item("warm", range(8), max_tokens=1)])
    for record in records_of(b.seen, AttemptKey("warm", 0)):
        assert record.digest == 0
        b.inventory.set_digest(record.block_id, 100 + record.index)
    b.serve([item("a", range(9))])
    assert [r.digest for r in records_of(b.seen)] == [100, 101]


@pytest.mark.parametrize("sampling", [{"max_tokens": 1}, {"max_tokens": 9, "eos": "first"}])
def test_a_request_may_end_with_its_first_token(bench, item, expected, sampling) -> None:
    (first,) = expected(item("a", range(6), max_tokens=1))
    if "eos" in sampling:
        sampling = {**sampling, "eos": (first,)}
    b = bench(role=PrefillRole(lease_s=5.0))
    seen = b.serve([item("a", range(6), **sampling)])
    assert seen.outputs[-1].prefilled[0].closing.finished
    assert seen.finish[A] is (FinishReason.STOP if "eos" in sampling else FinishReason.LENGTH)
    b.inventory.end(A)
    b.assert_nothing_held()


@pytest.mark.parametrize("steps", [1, 2])
def test_cancelling_a_prefill_in_progress_ends_its_lease(bench, item, steps) -> None:
    b = bench(role=PrefillRole(lease_s=5.0))
    b.loop.submit(item("a", range(60)), b.now)
    for _ in range(steps):
        b.step()
    assert b.inventory.leases_open() == 1
    b.loop.cancel(A)
    b.assert_nothing_held()


def test_a_failed_prefill_ends_its_lease(bench, item) -> None:
    b = bench(role=PrefillRole(lease_s=5.0))
    b.executor.poison = {90}
    b.serve([item("a", [*range(20), 90])])
    assert A in b.seen.failed
    b.assert_nothing_held()


def test_a_prefill_needs_memory_for_its_prompt_only(bench, item) -> None:
    b = bench(role=PrefillRole(lease_s=5.0), blocks=4)
    b.serve([item("a", range(15), max_tokens=1000)])
    assert len(b.seen.tokens[A]) == 1
    b.inventory.end(A)
    b.assert_nothing_held()


def test_prompts_wait_for_leases_to_end_without_spinning(bench, item) -> None:
    b = bench(role=PrefillRole(lease_s=5.0), blocks=4)
    b.loop.submit(item("a", range(12)), b.now)
    b.loop.submit(item("b", range(20, 32)), b.now)
    b.drain()
    assert not b.loop.has_work()
    assert b.loop.load().waiting == 1
    b.inventory.end(A)
    b.drain()
    assert len(b.seen.tokens[AttemptKey("b", 0)]) == 1


def test_a_role_change_sacrifices_a_hand_over_by_giving_it_back(bench, item, expected) -> None:
    b = bench(role=DecodeRole(), blocks=10)
    stream = item("s", range(4), max_tokens=20)
    b.loop.submit(stream, b.now)
    while len(b.seen.tokens[stream.key]) < 4:
        b.step()
    b.loop.role = PrefillRole(lease_s=100.0)
    b.loop.submit(item("a", range(30, 58)), b.now)
    b.step()
    assert b.inventory.leases_open() == 1
    elsewhere = b.inventory.allocate(b.inventory.counts().free)
    b.step()  # the stream needs its third block now
    assert b.seen.given_back == [A]
    assert b.inventory.leases_open() == 0
    b.inventory.release(elsewhere)
    seen = b.drain()
    assert seen.tokens[stream.key] == expected(stream)
    b.assert_nothing_held()


@pytest.mark.parametrize("prompt_len", [3, 8, 37])
def test_split_tokens_are_the_tokens_of_one_worker(bench, item, expected, prompt_len) -> None:
    """The hand-off in miniature: records in, blocks copied by generation, the item continued elsewhere."""
    source, sink = bench(role=PrefillRole(lease_s=5.0)), bench(role=DecodeRole())
    items = [item(f"r{n}", range(n, n + prompt_len), max_tokens=12, choice=n) for n in range(5)]
    seen = source.serve(items)
    for i in items:
        (prefilled,) = [p for o in seen.outputs for p in o.prefilled if p.key == i.key]
        records = records_of(seen, i.key) + ([prefilled.partial] if prefilled.partial else [])
        blocks = sink.inventory.allocate(len(records))
        for record, block in zip(records, blocks, strict=True):
            assert source.inventory.generation(record.block_id) == record.generation
            sink.executor.slots[block] = list(source.executor.slots[record.block_id])
        source.inventory.end(i.key)
        arrived = item(i.key.request_id, i.token_ids, max_tokens=12, choice=i.choice, generated=prefilled.closing.generated)
        sink.loop.submit(arrived, sink.now, blocks=blocks, computed_len=prefilled.closing.num_tokens)
    rest = sink.drain()
    for i in items:
        assert seen.tokens[i.key] + rest.tokens[i.key] == expected(i)
    source.assert_nothing_held()
    sink.assert_nothing_held()


@pytest.mark.parametrize("exact", [0, 1, 3])
def test_what_is_computed_on_lossy_kv_goes_under_the_salted_chain(bench, item, expected, exact) -> None:
    """`exact` blocks in front keep the keys they have; nothing computed on what follows them gets an exact key."""
    b, salted_root = bench(role=DecodeRole()), root_key(b"fake", codec="int8")
    prompt = tuple(range(14))  # three blocks and a half
    tokens = expected(item("a", prompt, max_tokens=12))
    whole = (*prompt, *tokens)
    keys, salted = block_keys(root_key(b"fake"), whole, 4), block_keys(salted_root, whole, 4)
    blocks = b.pulled(prompt)
    for index in range(3):
        b.inventory.commit(blocks[index], (keys if index < exact else salted)[index])
    arrived = item("a", prompt, max_tokens=12, generated=tokens[:1])
    b.loop.submit(arrived, b.now, blocks, len(prompt), salted_root)
    seen = b.drain()
    assert seen.tokens[A] == tokens[1:]
    full = (len(whole) - 1) // 4
    assert [b.inventory.key_of(block) for block in blocks[:3]] == [*keys[:exact], *salted[exact:3]]
    assert len(b.inventory.match(keys)) == exact
    assert len(b.inventory.match(salted[exact:])) == full - exact
