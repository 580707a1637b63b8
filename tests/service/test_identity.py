"""The same tokens from `transformers` (greedy), one colocated worker, and split workers over every transport,

one request at a time and inside a mixed batch of 16, for every architecture and the demo model.
"""

from __future__ import annotations

import asyncio
import random

import pytest
from checkpoints import MODELS, greedy_of_transformers, make_checkpoint
from in_loop import cluster_in_loop

from tandem import AsyncClient, SamplingParams

pytestmark = [pytest.mark.service, pytest.mark.timeout(240)]

MAX_TOKENS = 20
SHAPES = {
    "colocated": {"cluster.prefill": 0, "cluster.decode": 0, "cluster.colocated": 1},
    "loopback": {"transfer.transport": "loopback"},
    "shm": {"transfer.transport": "shm"},
    "tcp": {"transfer.transport": "tcp"},
    "grpc": {"transfer.transport": "grpc"},
    "collective": {"transfer.transport": "collective"},
}
# Small chunks and blocks, so that prompts take several of each and batches mix prefill with decode.
ENGINE = {"engine.max_step_tokens": 48, "engine.block_size": 16, "engine.kv_bytes": 8 * 2**20, "router.http": "127.0.0.1:0"}


def requests() -> list[tuple[list[int], SamplingParams]]:
    """16 requests of 1 to 150 tokens, half of them greedy, the others sampled with their own seeds and settings."""
    rng = random.Random(3)
    lengths = [1, 3, 15, 16, 17, 31, 33, 47, 48, 49, 64, 90, 100, 120, 140, 150]
    prompts = [[rng.randrange(300, 4000) for _ in range(length)] for length in lengths]
    sampled = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.8, ignore_eos=True)
    kinds = [
        {"top_k": 40},
        {"top_p": 0.9},
        {"min_p": 0.02, "temperature": 1.2},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    ]
    out = []
    for i, prompt in enumerate(prompts):
        fields = {"temperature": 0.0} if i % 2 == 0 else {"seed": i, **kinds[i // 2 % len(kinds)]}
        plain = {name: getattr(sampled, name) for name in ("max_tokens", "temperature", "ignore_eos")}
        out.append((prompt, SamplingParams(**{**plain, **fields})))
    return out


REQUESTS = requests()


async def alone_and_together(address: str) -> tuple[list[list[int]], list[list[int]]]:
    async with AsyncClient(address) as client:
        alone = [list((await client.generate(*request)).token_ids) for request in REQUESTS]
        together = await asyncio.gather(*(client.generate(*request) for request in REQUESTS))
    return alone, [list(result.token_ids) for result in together]


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request, tmp_path_factory):
    folder = make_checkpoint(request.param, tmp_path_factory.mktemp(request.param))
    indices = [i for i, (_, params) in enumerate(REQUESTS) if params.temperature == 0]
    greedy = dict(zip(indices, greedy_of_transformers(folder, [REQUESTS[i][0] for i in indices], MAX_TOKENS), strict=True))
    assert len({tuple(tokens) for tokens in greedy.values()}) > 1, "the checkpoint says the same whatever it is asked"
    assert any(len(set(tokens)) > 3 for tokens in greedy.values()), "the checkpoint repeats itself: mistakes would hide"
    return folder, greedy, {}


@pytest.mark.parametrize("shape", SHAPES)
async def test_tokens_are_identical(checkpoint, shape):
    folder, greedy, first = checkpoint
    # Prefix reuse off: the second round must compute its prompts again inside the batch.
    overrides = {"model.path": str(folder), "engine.prefix_cache": False, **ENGINE, **SHAPES[shape]}
    async with cluster_in_loop(overrides) as addresses:
        alone, together = await alone_and_together(addresses.grpc)
    assert {i: alone[i] for i in greedy} == greedy
    assert together == alone
    assert first.setdefault("tokens", alone) == alone, "differs from the colocated worker"


async def test_tokens_are_identical_with_prefix_reuse(checkpoint):
    folder, _, first = checkpoint
    async with cluster_in_loop({"model.path": str(folder), **ENGINE, **SHAPES["shm"]}) as addresses:
        alone, together = await alone_and_together(addresses.grpc)
    assert together == alone
    assert first.setdefault("tokens", alone) == alone
