"""The Kv service against peers that do not keep to the protocol, and a source that is killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys

import grpc
import numpy as np
import pytest
from handoff_pair import EPOCH, LAYOUT, destination_end, source_end
from transport_suite import until

from core.blocks import KvSource, KvTicket
from core.errors import TransferError
from core.request import AttemptKey
from core.wire import key_to_pb
from kvtransfer.arena import host_id
from kvtransfer.service import READ_BLOCKS_MAX
from tandem.v1 import kv_pb2, kv_pb2_grpc

KEY = AttemptKey("request", 1)
TOKENS = list(range(100, 190))

SOURCE = """
import asyncio, json, sys
sys.path.insert(0, sys.argv[1])
from handoff_pair import source_end
from core.request import AttemptKey
async def main():
    async with source_end(shm_dir=sys.argv[2]) as source:
        key, tokens = AttemptKey("request", 1), list(range(100, 190))
        source.open(key)
        source.announce(key, tokens, 0, 3)
        print(json.dumps([source.server.address, source.arena.path]), flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""


def follow(*requests):
    async def stream():
        for request in requests:
            yield request
        await asyncio.Event().wait()

    return stream()


def opening(key=KEY, epoch=EPOCH):
    return kv_pb2.FollowRequest(open=kv_pb2.FollowOpen(key=key_to_pb(key), epoch=epoch))


@pytest.fixture
async def served():
    async with source_end() as source, grpc.aio.insecure_channel(source.server.address) as channel:
        yield source, kv_pb2_grpc.KvStub(channel)


async def failure(call):
    async with asyncio.timeout(10):
        code = await call.code()
    return code, await call.details()


@pytest.mark.parametrize("first", [kv_pb2.FollowRequest(), kv_pb2.FollowRequest(renew=kv_pb2.FollowRenew())])
async def test_a_follow_begins_with_an_opening(served, first):
    _, stub = served
    code, details = await failure(stub.Follow(follow(first)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "`open`" in details


async def test_a_renewal_is_answered_and_unknown_words_are_ignored(served):
    source, stub = served
    source.open(KEY)
    renew = kv_pb2.FollowRequest(renew=kv_pb2.FollowRenew())
    call = stub.Follow(follow(opening(), renew, kv_pb2.FollowRequest(), renew))
    async with asyncio.timeout(10):
        for _ in range(3):
            answer = await call.read()
            assert answer.HasField("blocks")
            assert not answer.blocks.blocks
    call.cancel()
    await until(lambda: not source.exports._followers)
    assert len(source.exports) == 1, "a follower that hangs up may come again"


async def test_the_last_blocks_and_the_closing_come_in_one_message(served):
    source, stub = served
    source.open(KEY)
    call = stub.Follow(follow(opening()))
    async with asyncio.timeout(10):
        assert not (await call.read()).blocks.blocks
        source.announce(KEY, TOKENS, 0, 2)
        source.close(KEY, TOKENS)
        last = await call.read()
    call.cancel()
    assert len(last.blocks.blocks) >= 2
    assert last.closing.num_tokens == len(TOKENS)


async def test_done_ends_stream_and_export(served):
    source, stub = served
    source.open(KEY)
    call = stub.Follow(follow(opening(), kv_pb2.FollowRequest(done=kv_pb2.FollowDone())))
    async with asyncio.timeout(10):
        heard = [message async for message in call]
        assert await call.code() is grpc.StatusCode.OK
    assert not any(message.HasField("revoked") for message in heard)
    assert len(source.exports) == 0


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"epoch": EPOCH + 1}, grpc.StatusCode.UNAVAILABLE, "epoch"),
        ({"key": key_to_pb(AttemptKey("request", 2))}, grpc.StatusCode.UNAVAILABLE, "not on offer"),
        (
            {"indices": [0] * (READ_BLOCKS_MAX + 1), "block_ids": [0] * (READ_BLOCKS_MAX + 1)},
            grpc.StatusCode.INVALID_ARGUMENT,
            "ask for at most",
        ),
        ({"block_ids": [5], "generations": [1]}, grpc.StatusCode.UNAVAILABLE, "were not announced"),
        ({"indices": [0, 1]}, grpc.StatusCode.INVALID_ARGUMENT, "as many indices"),
        ({"digests": [1, 2]}, grpc.StatusCode.INVALID_ARGUMENT, "as many digests"),
        ({"codec": "planes"}, grpc.StatusCode.INVALID_ARGUMENT, "digest of each block"),
    ],
)
async def test_reads_are_bounded_to_what_was_announced(served, change, status, message):
    source, stub = served
    source.open(KEY)
    record = source.announce(KEY, TOKENS, 0, 1)[0]
    place = {"indices": [0], "block_ids": [record.block_id], "generations": [record.generation]}
    fields = {"key": key_to_pb(KEY), "epoch": EPOCH, **place, **change}
    code, details = await failure(stub.Read(kv_pb2.ReadRequest(**fields), timeout=5))
    assert code is status
    assert message in details


async def test_a_read_needs_a_deadline(served):
    source, stub = served
    source.open(KEY)
    request = kv_pb2.ReadRequest(key=key_to_pb(KEY), epoch=EPOCH)
    code, details = await failure(stub.Read(request))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "deadline" in details
    async with asyncio.timeout(10):
        assert [chunk async for chunk in stub.Read(request, timeout=5)] == []


@pytest.mark.parametrize("transport", ["shm", "grpc"])
async def test_a_killed_source_fails_the_pull_and_leaves_what_arrived(transport, tmp_path):
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SOURCE, os.path.dirname(__file__), str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    try:
        address, path = json.loads(await process.stdout.readline())
        offered = ("loopback", "shm", "grpc")
        ticket = KvTicket(KEY, LAYOUT, KvSource("prefill-0", EPOCH, address, host_id(str(tmp_path)), path, 64, offered), 10.0)
        async with destination_end(transport=transport, shm_dir=str(tmp_path)) as destination:
            plan = destination.plan(TOKENS)
            task = asyncio.create_task(destination.puller.pull(ticket, plan))
            await until(lambda: destination.fetcher.stats.blocks[transport] == 3 or task.done())
            process.send_signal(signal.SIGKILL)
            async with asyncio.timeout(10):
                with pytest.raises(TransferError):
                    await task
            resident = destination.inventory.match(plan.keys)
            assert resident == plan.blocks[:3], "blocks that were checked stay as cache"
            expected = np.random.default_rng(TOKENS[:16]).integers(0, 256, LAYOUT.block_bytes, np.uint8)
            assert np.array_equal(destination.arena.bytes_view()[resident[0]], expected)
            assert not destination.fetcher.transports["shm"]._mapped, "the dead worker's memory is not kept"
            destination.inventory.release(resident)
            destination.expect_all_free(plan)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
