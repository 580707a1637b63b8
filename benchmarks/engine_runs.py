"""One generation by our engine and by transformers, each timed token by token in the same way."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from core.blocks import blocks_for, root_key
from core.config import EngineConfig
from core.inventory import Inventory
from core.request import AttemptKey, WorkItem
from engine.load import load_model
from engine.loop import StepLoop
from engine.torch_executor import TorchExecutor
from tandem.sampling import SamplingParams
from worker.colocated import ColocatedRole

FIRST_TOKEN_ID, LAST_TOKEN_ID = 300, 4000


class Timed(NamedTuple):
    """`prefill_s` until all sequences have their first token, then the gap of each further step of the batch."""

    prefill_s: float
    gaps_s: list[float]


def prompts(batch: int, length: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(FIRST_TOKEN_ID, LAST_TOKEN_ID) for _ in range(length)] for _ in range(batch)]


class Ours:
    """The step loop with the colocated role over the executor: all of a worker that stands between request and token."""

    def __init__(self, folder: Path, dtype: str, tokens_max: int) -> None:
        model = load_model(str(folder), dtype)
        num_blocks = blocks_for(tokens_max, model.layout.block_size)
        kv = torch.zeros(num_blocks, *model.layout.shape, dtype=getattr(torch, dtype))
        config = EngineConfig(prefix_cache=False, max_step_tokens=512)
        fingerprint = model.layout.fingerprint
        self.path = model.model.path.name
        self._loop = StepLoop(
            config, ColocatedRole(), Inventory(num_blocks), TorchExecutor(model, kv), lambda salt: root_key(fingerprint, salt)
        )
        self._ids = itertools.count()

    def run(self, batch: list[list[int]], new_tokens: int) -> Timed:
        keys = set()
        start = time.perf_counter()
        for prompt in batch:
            key = AttemptKey(f"r{next(self._ids)}", 1)
            keys.add(key)
            params = SamplingParams(max_tokens=new_tokens, temperature=0.0, seed=0, ignore_eos=True)
            self._loop.submit(WorkItem(key, tuple(prompt), len(prompt), params), start)
        first: set[AttemptKey] = set()
        times: list[float] = []
        while self._loop.has_work():
            out = self._loop.step(time.perf_counter())
            assert not out.failed, out.failed
            first |= {token.key for token in out.tokens}
            if first == keys:
                times.append(time.perf_counter())
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        return Timed(times[0] - start, gaps[: new_tokens - batch_spread(batch)])


def batch_spread(batch: list[list[int]]) -> int:
    """Sequences that started earlier end earlier: the last steps of a batch are not full, and not counted."""
    return 1 if len(batch) == 1 else len(batch)


class Theirs:
    """`generate` of transformers, as it stands; a logits processor takes the time of every step."""

    def __init__(self, folder: Path, dtype: str) -> None:
        from transformers import AutoModelForCausalLM  # the dev extras; slow to import

        kind: Any = AutoModelForCausalLM
        self._model = kind.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa").eval()

    def run(self, batch: list[list[int]], new_tokens: int) -> Timed:
        times: list[float] = []

        def clock(_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            times.append(time.perf_counter())
            return scores

        ids = torch.tensor(batch)
        start = time.perf_counter()
        self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            logits_processor=[clock],
        )
        return Timed(times[0] - start, [later - earlier for earlier, later in itertools.pairwise(times)])


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def read_gbps(seconds: float = 0.3) -> float:
    """Bytes per second that the threads can read from memory, median of passes over 256 MiB."""
    data = torch.ones(64 * 2**20)
    return data.nbytes / _median_s(lambda: data.sum(), seconds) / 1e9


def matmul_gflops(dtype: str, seconds: float = 0.5) -> float:
    """Of torch's own product of 1024 x 1024 matrices."""
    a, b = (torch.randn(1024, 1024).to(getattr(torch, dtype)) for _ in range(2))
    return 2 * 1024**3 / _median_s(lambda: a @ b, seconds) / 1e9


def _median_s(run: Any, seconds: float) -> float:
    run()
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while len(taken) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return sorted(taken)[len(taken) // 2]
