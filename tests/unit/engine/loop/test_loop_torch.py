"""The step loop over the real executor: tokens do not depend on the batch, the chunks, the cache, shortages or a split."""

from __future__ import annotations

import pytest
import torch

from core.blocks import root_key
from core.config import EngineConfig
from core.inventory import Inventory
from core.request import AttemptKey
from decode_worker.role import DecodeRole
from engine.loop import StepLoop
from engine.torch_executor import TorchExecutor
from prefill_worker.role import PrefillRole
from worker.colocated import ColocatedRole

SAMPLINGS = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "seed": 9},
    {"temperature": 1.0, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2, "seed": 5},
]


class Worker:
    def __init__(self, model, role, blocks: int = 256, **config) -> None:
        self.kv = torch.zeros(blocks, *model.layout.shape)
        self.executor = TorchExecutor(model, self.kv)
        self.inventory = Inventory(blocks)
        config = EngineConfig(block_size=4, **{"max_step_tokens": 32, **config})
        self.loop = StepLoop(config, role, self.inventory, self.executor, lambda salt: root_key(b"m", salt))
        self.tokens: dict[AttemptKey, list[int]] = {}
        self.records, self.prefilled, self.given_back = {}, {}, []

    def drain(self) -> dict[AttemptKey, list[int]]:
        for _ in range(3000):
            if not self.loop.has_work():
                self.loop.check()
                return self.tokens
            output = self.loop.step(0.0)
            assert not output.failed
            for event in output.tokens:
                self.tokens.setdefault(event.key, []).append(event.token_id)
            for committed in output.committed:
                self.records.setdefault(committed.key, []).extend(committed.records)
            self.prefilled |= {p.key: p for p in output.prefilled}
            self.given_back += [given.key for given in output.given_back]
        raise AssertionError("still at work")

    def serve(self, items) -> dict[AttemptKey, list[int]]:
        for item in items:
            self.loop.submit(item, 0.0)
        return self.drain()


def requests(item, count: int = 12, max_tokens: int = 20):
    """Prompts of many lengths, half of them beginning alike, greedy and sampled."""
    items = []
    for n in range(count):
        shared = [(7 * i) % 300 + 10 for i in range(13)] if n % 2 else []
        own = [(31 * n + 17 * i) % 300 + 10 for i in range(1 + 5 * n)]
        items.append(item(f"r{n}", shared + own, max_tokens=max_tokens, eos=(2,), **SAMPLINGS[n % len(SAMPLINGS)]))
    return items


@pytest.fixture(scope="module")
def alone():
    """Tokens of each request served by a fresh worker of its own, per variant."""
    return {}


@pytest.fixture(params=["llama", "mistral"])
def variant(request, loaded, item, alone):
    model = loaded(request.param)
    if not model.batch_invariant:
        pytest.skip("this machine offers no batch-invariant products")
    if request.param not in alone:
        tokens = {}
        for one in requests(item):
            tokens |= Worker(model, ColocatedRole(), prefix_cache=False).serve([one])
        alone[request.param] = tokens
    return request.param


def test_requests_alone_say_something(variant, alone) -> None:
    assert len(alone[variant]) == 12
    assert len({tuple(tokens) for tokens in alone[variant].values()}) == 12
    assert sum(map(len, alone[variant].values())) > 150


@pytest.mark.parametrize("max_step_tokens", [16, 40, 512])
def test_batches_chunks_and_cached_prefixes_change_no_token(variant, loaded, item, alone, max_step_tokens) -> None:
    worker = Worker(loaded(variant), ColocatedRole(), max_step_tokens=max_step_tokens)
    assert worker.serve(requests(item)) == alone[variant]
    assert max(p.cached_tokens for p in worker.prefilled.values()) >= (12 if max_step_tokens < 512 else 0)
    assert worker.inventory.counts().active == 0


def test_being_computed_again_for_lack_of_memory_changes_no_token(variant, loaded, item, alone) -> None:
    worker = Worker(loaded(variant), ColocatedRole(), blocks=24)
    forgotten = []
    forget = worker.executor.forget
    worker.executor.forget = lambda seq_id: (forgotten.append(seq_id), forget(seq_id))
    assert worker.serve(requests(item)) == alone[variant]
    assert len(forgotten) > 12, "memory was never short"
    assert worker.inventory.counts().active == 0


def test_continuing_on_another_worker_changes_no_token(variant, loaded, item, alone) -> None:
    items = requests(item)
    continued = []
    for n, one in enumerate(items):
        done = alone[variant][one.key][: n % 7]
        if len(done) < len(alone[variant][one.key]):
            sampling = {"eos": (2,), **SAMPLINGS[n % len(SAMPLINGS)]}
            continued.append(item(one.key.request_id, one.token_ids, max_tokens=20, generated=done, **sampling))
    tokens = Worker(loaded(variant), DecodeRole()).serve(continued)
    assert len(tokens) == len(continued) > 8
    for one in continued:
        assert tokens[one.key] == alone[variant][one.key][one.position :]


def test_splitting_prefill_from_decode_changes_no_token(variant, loaded, item, alone) -> None:
    source, sink = Worker(loaded(variant), PrefillRole(lease_s=5.0)), Worker(loaded(variant), DecodeRole())
    items = requests(item)
    first = source.serve(items)
    for n, one in enumerate(items):
        prefilled = source.prefilled[one.key]
        if prefilled.closing.finished:
            continue
        records = source.records.get(one.key, []) + ([prefilled.partial] if prefilled.partial else [])
        blocks = sink.inventory.allocate(len(records))
        for record, block in zip(records, blocks, strict=True):
            sink.kv[block] = source.kv[record.block_id]
        sampling = {"eos": (2,), **SAMPLINGS[n % len(SAMPLINGS)]}
        name, generated = one.key.request_id, prefilled.closing.generated
        arrived = item(name, one.token_ids, max_tokens=20, generated=generated, **sampling)
        sink.loop.submit(arrived, 0.0, blocks=blocks, computed_len=prefilled.closing.num_tokens)
    rest = sink.drain()
    assert {key: first[key] + rest.get(key, []) for key in first} == alone[variant]
