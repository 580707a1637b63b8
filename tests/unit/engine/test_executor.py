"""The executor against transformers, and against itself: a token's logits do not depend on what is computed beside it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor

from core.blocks import blocks_for
from engine.step import Row, SampleSpec, StepPlan
from tandem.sampling import SamplingParams

Get = Callable[..., Any]
GREEDY = SamplingParams(temperature=0.0)
EVERY = ["llama", "llama3", "linear", "mistral", "qwen2", "qwen2-window", "qwen3"]
LENGTHS = (1, 2, 5, 23, 24, 25, 40, 63, 64, 65, 100, 130, 300, 401, 420, 530)
BLOCK_SIZE = 4


def tokens(length: int, seed: int = 1) -> list[int]:
    rng = random.Random(seed * 1000 + length)
    return [rng.randrange(3, 320) for _ in range(length)]


def blocks(length: int, first: int = 0) -> list[int]:
    return list(range(first, first + blocks_for(length, BLOCK_SIZE)))


def prefill(executor: Any, prompt: Sequence[int], where: Sequence[int], chunk: int = 10**9, seq_id: int = 0) -> Tensor:
    """Logits after the prompt, computed in chunks."""
    logits = torch.empty(0)
    for start in range(0, len(prompt), chunk):
        logits = executor.logits(StepPlan((Row(seq_id, prompt[start : start + chunk], start, where, None),)))
    return logits[0]


def generate(executor: Any, prompt: list[int], steps: int, where: Sequence[int]) -> list[int]:
    history, todo = list(prompt), list(prompt)
    for position in range(steps):
        sample = SampleSpec(GREEDY, 0, position, history, len(prompt))
        [picked] = executor.run(StepPlan((Row(0, todo, len(history) - len(todo), where, sample),)))
        history.append(picked.token_id)
        todo = [picked.token_id]
    return history[len(prompt) :]


@pytest.mark.parametrize("variant", EVERY)
def test_greedy_tokens_equal_those_of_transformers(reference: Get, executor: Get, variant: str) -> None:
    prompt = tokens(70)
    with torch.no_grad():
        expected = reference(variant).generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=40,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(prompt) :]
    assert len(set(expected.tolist())) > 10, "a model that repeats itself proves nothing"
    assert generate(executor(variant), prompt, 40, blocks(110)) == expected.tolist()


@pytest.mark.parametrize("variant", ["llama3", "qwen3"])
def test_logits_are_close_to_those_of_transformers(reference: Get, executor: Get, variant: str) -> None:
    prompt = tokens(500)  # more than one chunk of keys
    with torch.no_grad():
        expected = reference(variant)(torch.tensor([prompt])).logits[0, -1]
    torch.testing.assert_close(prefill(executor(variant), prompt, blocks(500)), expected, atol=2e-3, rtol=0.0)


def test_bfloat16_stays_near_float32(executor: Get) -> None:
    prompt = tokens(60)
    exact = torch.softmax(prefill(executor("llama"), prompt, blocks(60)), -1)
    rounded = torch.softmax(prefill(executor("llama", "bfloat16"), prompt, blocks(60)), -1)
    assert torch.nn.functional.cosine_similarity(exact, rounded, 0) > 0.95


@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
@pytest.mark.parametrize("variant", ["llama", "mistral", "qwen2-window", "qwen3"])
def test_chunks_give_the_same_bits_as_the_whole_prompt(executor: Get, variant: str, chunk: int) -> None:
    prompt = tokens(90 if chunk == 1 else 430)
    whole = prefill(executor(variant), prompt, blocks(430))
    assert torch.equal(prefill(executor(variant), prompt, blocks(430, 90), chunk), whole)


@pytest.mark.parametrize("variant", EVERY)
def test_a_row_has_the_same_bits_alone_and_in_a_mixed_batch(executor: Get, variant: str) -> None:
    prompts = [tokens(length, seed) for seed, length in enumerate(LENGTHS)]
    alone = [prefill(executor(variant), [*prompt, 7], blocks(len(prompt) + 1)) for prompt in prompts]
    shared, free = executor(variant), count()
    where = [[next(free) % 256 for _ in blocks(len(prompt) + 1)] for prompt in prompts]
    assert sum(map(len, where)) > 256, "this test wants reused blocks: two rounds of sequences"
    for half in (range(0, 13), range(13, 16)):
        _mixed(shared, {i: [*prompts[i], 7] for i in half}, where, alone)


def _mixed(executor: Any, todo: dict[int, list[int]], where: list[list[int]], alone: list[Tensor]) -> None:
    """Feeds all sequences in random pieces side by side and compares each one's last row."""
    rng, done = random.Random(5), dict.fromkeys(todo, 0)
    while todo:
        chosen = rng.sample(sorted(todo), rng.randint(1, len(todo)))
        pieces = {i: todo[i][done[i] : done[i] + rng.choice([1, 3, 16, 100, 400])] for i in chosen}
        logits = executor.logits(StepPlan(tuple(Row(i, pieces[i], done[i], where[i], None) for i in chosen)))
        for row, i in enumerate(chosen):
            done[i] += len(pieces[i])
            if done[i] == len(todo[i]):
                assert torch.equal(logits[row], alone[i]), f"sequence {i} of {len(todo[i])} tokens"
                del todo[i]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_prefix_copied_to_other_blocks_is_reused(loaded: Get, dtype: str) -> None:
    from engine.torch_executor import TorchExecutor

    model = loaded("llama", dtype)
    kv = torch.zeros(256, *model.layout.shape, dtype=getattr(torch, dtype))
    executor, prompt = TorchExecutor(model, kv), tokens(50)
    whole = prefill(executor, prompt, blocks(50))
    moved = [200, 100, 150, 90, 91]  # the first 20 tokens' blocks, elsewhere
    kv[moved] = kv[:5].clone()
    rest = Row(9, prompt[20:], 20, [*moved, *range(210, 218)], None)
    reused = executor.logits(StepPlan((rest,)))[0]
    if dtype == "float32":
        assert torch.equal(reused, whole)
    else:
        torch.testing.assert_close(reused, whole, atol=0.5, rtol=0.1)


def test_a_swapped_block_is_noticed(executor: Get) -> None:
    """A commit may replace a block by an equal one: the table kept between steps must not go on naming the old one."""
    first = executor("llama")
    prompt = tokens(8)
    prefill(first, prompt, [0, 1, 2])
    prefill(first, prompt, [5, 6, 7], seq_id=1)
    expected = first.logits(StepPlan((Row(0, [9], 8, [0, 1, 2], None),)))
    prefill(first, tokens(8, seed=4), [0, 1], seq_id=2)
    assert torch.equal(first.logits(StepPlan((Row(0, [9], 8, [5, 6, 2], None),))), expected)


def test_forgotten_sequences_leave_nothing(executor: Get) -> None:
    one = executor("llama")
    expected = prefill(one, tokens(12), [3, 4, 5], seq_id=1)
    one.forget(1)
    one.forget(1)
    prefill(one, tokens(30), blocks(30, 20), seq_id=1)
    assert torch.equal(prefill(one, tokens(12), [3, 4, 5], seq_id=1), expected)


def test_only_rows_that_ask_are_sampled_in_row_order(executor: Get) -> None:
    def row(seq_id: int, length: int, first: int, sampled: bool) -> Row:
        prompt = tokens(length)
        spec = SampleSpec(GREEDY, 0, 0, prompt, length) if sampled else None
        return Row(seq_id, prompt, 0, blocks(length, first), spec)

    one = executor("llama")
    picks = one.run(StepPlan((row(4, 9, 0, True), row(2, 30, 20, False), row(3, 1, 40, True), row(1, 17, 60, True))))
    assert [pick.seq_id for pick in picks] == [4, 3, 1]
    assert picks[2].token_id == int(prefill(executor("llama"), tokens(17), blocks(17)).argmax())
    assert one.run(StepPlan(())) == []


def test_seeded_tokens_do_not_depend_on_the_batch(executor: Get) -> None:
    params = SamplingParams(temperature=0.9, top_p=0.9, seed=3, logprobs=2)
    prompt = tokens(33)
    row = Row(1, prompt, 0, blocks(33), SampleSpec(params, 0, 0, prompt, 33))
    [alone] = executor("qwen2").run(StepPlan((row,)))
    others = [
        Row(10 + i, tokens(n), 0, blocks(n, 20 + 12 * i), SampleSpec(SamplingParams(seed=i, top_k=5), 0, 0, tokens(n), n))
        for i, n in enumerate((1, 40, 17, 3))
    ]
    assert executor("qwen2").run(StepPlan((*others, row)))[-1] == alone


@pytest.mark.parametrize(
    ("where", "start", "told"),
    [([0, 256], 0, "block id"), ([0, -1], 0, "block id"), ([*range(256), 0, 1], 1022, "context"), ([0], 0, "blocks")],
)
def test_what_would_leave_the_memory_is_refused(executor: Get, where: list[int], start: int, told: str) -> None:
    with pytest.raises(AssertionError, match=told):
        executor("llama").logits(StepPlan((Row(0, tokens(5), start, where, None),)))
