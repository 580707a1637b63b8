"""Copies of hot blocks between the stores of two hosts, as an operator configures them: made by use, given up without it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import pytest
from store_rig import LAYOUT, Client, bytes_of, keys_of, outcome, store_spec, worker_end

from cluster.directory_service import directory_registration
from core.blocks import KvSource
from core.clock import SystemClock
from core.request import AttemptKey, WorkerRole
from core.service import serve
from kvtransfer.arena import host_id
from kvtransfer.directory import NodeRecord
from kvtransfer.local_directory import LocalDirectory
from kvtransfer.main import StoreInfo, run
from kvtransfer.remote_directory import RemoteDirectory
from tandem.v1 import kv_pb2, kv_pb2_grpc

pytestmark = pytest.mark.service
DEADLINE_S = 30.0
WINDOW_S = 0.5


@dataclass
class Store:
    info: StoreInfo
    client: Client

    async def listed(self) -> dict[bytes, kv_pb2.BlockEntry]:
        calls = self.client.stub.List(kv_pb2.ListRequest(), timeout=10)
        return {entry.key: entry async for reply in calls for entry in reply.entries}

    async def metric(self, name: str) -> float:
        host, port = self.info.metrics_address.rsplit(":", 1)
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        async with asyncio.timeout(DEADLINE_S):
            body = (await reader.read()).decode()
        writer.close()
        await writer.wait_closed()
        return float(next(line.rpartition(" ")[2] for line in body.splitlines() if line.startswith(name)))


@asynccontextmanager
async def store(name: str, shm: Path, disk: Path, controller: str) -> AsyncIterator[Store]:
    """A host of its own, as its shared memory tells."""
    ways = {
        "store__replicate_hits": 3,
        "store__replicate_window_s": WINDOW_S,
        "store__directory_ttl_s": 1.0,
        "store__tenant_share": 0.5,
        "transfer__transport": "auto",
    }
    spec = replace(store_spec(shm, disk, **ways), worker_id=name, controller=controller)
    stop, ready = asyncio.Event(), asyncio.get_running_loop().create_future()
    task = asyncio.create_task(run(spec, stop, ready.set_result), name=name)
    await asyncio.wait((task, ready), return_when=asyncio.FIRST_COMPLETED, timeout=DEADLINE_S)
    info: StoreInfo = ready.result()
    async with grpc.aio.insecure_channel(info.grpc_address) as channel:
        try:
            yield Store(info, Client(kv_pb2_grpc.KvStub(channel), spec.epoch))
        finally:
            stop.set()
            async with asyncio.timeout(DEADLINE_S):
                await task


async def test_copies_come_where_blocks_are_read_and_go_when_they_are_not(tmp_path):
    hot, cold = keys_of("hot", 6), keys_of("cold", 4)
    for host in "ab":
        (tmp_path / host).mkdir()
    async with serve("127.0.0.1:0", directory_registration(LocalDirectory(), SystemClock()), grace_s=0.0) as server:
        directory = RemoteDirectory(server.address, timeout_s=5.0)
        async with (
            store("store-0", tmp_path / "a", tmp_path / "disk-a", server.address) as here,
            store("store-1", tmp_path / "b", tmp_path / "disk-b", server.address) as there,
            worker_end(tmp_path / "a") as worker,
        ):
            reader = KvSource("decode-7", 1, "127.0.0.1:1", host_id(str(tmp_path / "b")))
            await directory.join(NodeRecord(reader, LAYOUT, WorkerRole.DECODE), 600.0)
            assert outcome(await here.client.offer(worker, hot, tenant=b"acme")) == (6, 0, 0)
            await here.client.offer(worker, cold)
            reads = 0

            async def copied() -> bool:
                nonlocal reads
                reads += 1
                assert await here.client.read(hot, AttemptKey(f"hold/decode-7/1.{reads}", 1))
                return set(await there.listed()) >= set(hot)

            await eventually(copied)
            assert await there.client.read(hot) == {key: bytes_of(key).tobytes() for key in hot}
            copies = await there.listed()
            assert {entry.tenant for entry in copies.values()} == {b"acme"}
            assert not copies.keys() & set(cold), "nobody asked for these"
            assert await here.metric('tandem_kv_replicas_total{event="made"}') >= 6

            async def gone() -> bool:
                return not await there.listed()

            await eventually(gone)
            assert await there.metric('tandem_kv_replicas_total{event="given_up"}') >= 6
            assert await there.metric("tandem_kv_replicas ") == 0
            assert await there.metric("tandem_kv_evicted_idle_seconds_count") >= 6
            assert await there.metric("tandem_kv_evicted_idle_seconds_sum") > 0
            assert set(await here.client.read(hot + cold)) == {*hot, *cold}, "the originals stay"
        await directory.close()


async def eventually(check) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not await check():  # noqa: ASYNC110 - other processes announce themselves to nobody
            await asyncio.sleep(0.02)
