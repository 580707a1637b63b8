"""The store as a process: killed it costs misses, restarted it serves what its disk holds, stopped it leaves nothing."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from store_rig import LAYOUT, Client, bytes_of, keys_of, outcome, store_spec, worker_end

from cluster.directory_service import directory_registration
from cluster.launcher import Handle, LocalLauncher
from core.clock import SystemClock
from core.hostspec import HostSpec
from core.service import GrpcServer, serve
from kvtransfer.directory import DirectoryError, Holder, NodeRecord, Tier
from kvtransfer.local_directory import LocalDirectory
from kvtransfer.remote_directory import RemoteDirectory
from tandem.v1 import kv_pb2_grpc

pytestmark = pytest.mark.service
DEADLINE_S = 30.0


@dataclass
class Town:
    """A directory, and stores as processes that report to it."""

    directory: RemoteDirectory
    launcher: LocalLauncher
    server: GrpcServer
    shm: Path
    disk: Path
    lines: list[str]
    """What the processes wrote to standard error."""

    def spec(self, epoch: int, **overrides: Any) -> HostSpec:
        spec = store_spec(self.shm, self.disk, store__directory_ttl_s=1.5, log_level="warning", **overrides)
        return replace(spec, epoch=epoch, controller=self.server.address)

    async def start(self, epoch: int = 1, **overrides: Any) -> tuple[Handle, NodeRecord]:
        handle = await self.launcher.launch(self.spec(epoch, **overrides))
        found: list[NodeRecord] = []

        async def seen() -> bool:
            found[:] = [node for node in await self.nodes() if node.source.epoch == epoch]
            return bool(found) or handle.exited.done()

        await eventually(seen)
        assert found, handle.exited.result()
        return handle, found[0]

    async def nodes(self) -> list[NodeRecord]:
        try:
            return await self.directory.nodes()
        except DirectoryError:
            return []

    async def on_disk(self, keys: list[bytes], epoch: int) -> bool:
        holders = await self.located(keys)
        return len(holders) == len(keys) and all(Holder("store-0", epoch, Tier.DISK) in held for held in holders)

    async def said(self, words: str) -> bool:
        return any(words in line for line in self.lines)

    async def located(self, keys: list[bytes]) -> list[tuple[Holder, ...]]:
        try:
            return list((await self.directory.locate(keys)).holders)
        except DirectoryError:
            return []


async def eventually(check: Any) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not await check():  # noqa: ASYNC110 - other processes announce themselves to nobody
            await asyncio.sleep(0.02)


@asynccontextmanager
async def town(tmp_path: Path) -> AsyncIterator[Town]:
    (tmp_path / "shm").mkdir()
    lines: list[str] = []
    launcher = LocalLauncher(on_line=lines.append)
    async with serve("127.0.0.1:0", directory_registration(LocalDirectory(), SystemClock()), grace_s=0.0) as server:
        directory = RemoteDirectory(server.address, timeout_s=2.0)
        try:
            yield Town(directory, launcher, server, tmp_path / "shm", tmp_path / "disk", lines)
        finally:
            await directory.close()
            await launcher.close()


@asynccontextmanager
async def client_of(record: NodeRecord) -> AsyncIterator[Client]:
    async with grpc.aio.insecure_channel(record.source.grpc_address) as channel:
        yield Client(kv_pb2_grpc.KvStub(channel), record.source.epoch)


def pid_of(arena: Path) -> int:
    """An arena's name ends with the pid of its owner."""
    return int(arena.name.rpartition("-")[2])


async def test_a_store_is_found_through_the_directory_and_leaves_nothing(tmp_path):
    keys = keys_of("a", 30)
    async with town(tmp_path) as t, worker_end(t.shm) as worker:
        handle, record = await t.start()
        assert record.layout is None
        async with client_of(record) as client:
            assert outcome(await client.offer(worker, keys)) == (30, 0, 0)

            async def announced() -> bool:
                holders = await t.located(keys)
                return len(holders) == 30 and all({h.tier for h in held} == {Tier.DRAM, Tier.DISK} for held in holders)

            await eventually(announced)
            [record] = await t.nodes()
            assert record.layout == LAYOUT
            assert record.source.arena_path in map(str, t.shm.iterdir())
            assert record.source.transports[1] == "shm"
            assert len(await client.read(keys)) == 30
            maps = Path(f"/proc/{pid_of(Path(record.source.arena_path))}/maps")

            async def unmapped() -> bool:
                """The worker never joined: to the directory it is gone, and its memory must not be kept from the system."""
                return worker.arena.path not in await asyncio.to_thread(maps.read_text)

            await eventually(unmapped)
        await handle.stop(4.0)
        assert handle.exited.result().reason == "stopped"
        assert not await t.nodes(), "it said that it leaves"
        assert {p.name for p in t.shm.iterdir()} == {Path(worker.arena.path).name}


async def test_a_store_killed_under_offers_comes_back_with_its_disk(tmp_path):
    prompts = [keys_of(f"prompt {n}", 20) for n in range(40)]
    async with town(tmp_path) as t, worker_end(t.shm, blocks=2048) as worker:
        handle, record = await t.start()
        async with client_of(record) as client:
            await client.offer(worker, prompts[0])
            await eventually(lambda: t.on_disk(prompts[0], epoch=1))
            under_way = asyncio.Event()

            async def offer_for_ever(first: int) -> None:
                for keys in itertools.cycle(prompts[first:]):
                    await client.offer(worker, keys)
                    under_way.set()

            offers = [asyncio.create_task(offer_for_ever(first)) for first in (1, 11, 21, 31)]
            await under_way.wait()
            [arena] = t.shm.glob("tandem-store*")
            os.kill(pid_of(arena), signal.SIGKILL)
            async with asyncio.timeout(DEADLINE_S):
                ends = await asyncio.gather(*offers, return_exceptions=True)
            assert all(isinstance(end, grpc.aio.AioRpcError) for end in ends), ends
            assert (await handle.exited).reason == "killed by SIGKILL"
        _, record = await t.start(epoch=2)
        assert record.layout == LAYOUT, "known from the disk, before anybody asks"
        assert [pid_of(path) for path in t.shm.glob("tandem-store*")] == [pid_of(Path(record.source.arena_path))]
        await eventually(lambda: t.on_disk(prompts[0], epoch=2))
        async with client_of(record) as client:
            assert len(await client.read(prompts[0])) == 20
            for keys in prompts:  # whatever reached the disk is whole
                assert all(data == bytes_of(key).tobytes() for key, data in (await client.read(keys)).items())
            assert outcome(await client.offer(worker, keys_of("after", 5))) == (5, 0, 0)


async def test_a_directory_that_forgot_everything_hears_it_all_again(tmp_path):
    keys = keys_of("a", 30)
    async with town(tmp_path) as t, worker_end(t.shm) as worker:
        _, record = await t.start()
        async with client_of(record) as client:
            await client.offer(worker, keys)
            await eventually(lambda: t.on_disk(keys, epoch=1))
            address = t.server.address
            await t.server.__aexit__(None, None, None)
            assert len(await client.read(keys)) == 30, "without a directory those who know it read on"
            await client.offer(worker, keys_of("b", 5))
            async with serve(address, directory_registration(LocalDirectory(), SystemClock()), grace_s=0.0):
                await eventually(lambda: t.on_disk(keys, epoch=1))
                await eventually(lambda: t.on_disk(keys_of("b", 5), epoch=1))


async def test_of_two_stores_with_one_name_the_directory_knows_the_first(tmp_path):
    async with town(tmp_path) as t, worker_end(t.shm) as worker:
        _, record = await t.start()
        async with client_of(record) as client:
            await client.offer(worker, keys_of("a", 3))
        twin = await t.launcher.launch(replace(t.spec(1, store__disk_dir=str(tmp_path / "other")), listen="127.0.0.1:0"))
        await eventually(lambda: t.said("is not announced"))
        assert [node.source.grpc_address for node in await t.nodes()] == [record.source.grpc_address]
        assert not twin.exited.done()
        await twin.stop(4.0)
        assert [node.source.grpc_address for node in await t.nodes()] == [record.source.grpc_address], "not the twin's to leave"
