"""collective over nccl, between two GPUs of one host: the same path as gloo's, staged through device memory."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch
from killable_source import EPOCH, KEY, KillableSource, bytes_of

from kvtransfer.channels import Channels
from kvtransfer.collective import CollectiveTransport
from kvtransfer.collective_helper import Helper
from kvtransfer.shared_arena import SharedArena

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="nccl wants a GPU for each end"),
]
NUM_BLOCKS, BLOCK_BYTES = 64, 2**20


@pytest.mark.parametrize("places", [range(NUM_BLOCKS), range(NUM_BLOCKS - 1, -1, -1)])
async def test_blocks_between_two_gpus(tmp_path, places):
    directory = str(tmp_path)
    other = {"CUDA_VISIBLE_DEVICES": "1"}  # the destination's helper takes the first
    source = await asyncio.to_thread(KillableSource, directory, NUM_BLOCKS, BLOCK_BYTES, "nccl", other)
    dest = SharedArena(directory, "decode-0", EPOCH, NUM_BLOCKS, BLOCK_BYTES)
    helper, channels = Helper("nccl", "127.0.0.1", directory), Channels()
    transport = CollectiveTransport(dest, channels, helper, digest=True, timeout_s=60.0)
    for _ in range(2):
        dest.bytes_view()[:] = 0
        await transport.pull(source.kv, KEY, source.records, list(places))
        assert np.array_equal(dest.bytes_view()[list(places)], bytes_of(NUM_BLOCKS, BLOCK_BYTES))
    await transport.close()
    await channels.close()
    await helper.close()
    source.close()
    dest.close()
