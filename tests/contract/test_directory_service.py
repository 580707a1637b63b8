"""The controller's directory over gRPC: what it refuses, and a controller that dies, stalls and comes back."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from directory_rig import DEADLINE_S, TTL_S, Proxy, dram, keys, record, shown, until

from cluster.directory_service import directory_registration
from core.clock import SystemClock
from core.config import StoreConfig
from core.service import serve
from kvtransfer.directory import ANNOUNCE_KEYS_MAX, LOCATE_KEYS_MAX, DirectoryError, Tier, open_directory
from kvtransfer.directory_wire import node_to_pb
from kvtransfer.local_directory import LocalDirectory
from kvtransfer.redis_directory import RedisDirectory
from kvtransfer.remote_directory import RemoteDirectory
from tandem.v1 import directory_pb2 as pb
from tandem.v1 import directory_pb2_grpc

HELD = {("a", 1, Tier.DRAM)}
NODE = node_to_pb(record())


def served(address: str = "127.0.0.1:0"):
    return serve(address, directory_registration(LocalDirectory(), SystemClock()))


@pytest.mark.parametrize(
    ("method", "request_", "words"),
    [
        ("Join", pb.JoinRequest(node=NODE, ttl_s=0), "ttl_s must be above 0"),
        ("Join", pb.JoinRequest(node=NODE, ttl_s=float("nan")), "ttl_s must be"),
        ("Join", pb.JoinRequest(node=NODE, ttl_s=1e9), "ttl_s must be"),
        ("Join", pb.JoinRequest(ttl_s=1), "needs an id and an address"),
        ("Join", pb.JoinRequest(node=node_to_pb(record("x" * 5000)), ttl_s=1), "at most 4096"),
        ("Announce", pb.AnnounceRequest(added_dram=b"x" * 17), "16 bytes each"),
        ("Announce", pb.AnnounceRequest(added_dram=b"x" * 8, removed_disk=b"x" * 8), "16 bytes each"),
        ("Announce", pb.AnnounceRequest(added_disk=bytes(16 * ANNOUNCE_KEYS_MAX + 16)), "send at most"),
        ("Locate", pb.LocateRequest(keys=b"x"), "16 bytes each"),
        ("Locate", pb.LocateRequest(keys=bytes(16 * LOCATE_KEYS_MAX + 16)), "send at most"),
    ],
)
async def test_what_it_refuses(method, request_, words):
    async with served() as server, grpc.aio.insecure_channel(server.address) as channel:
        stub = directory_pb2_grpc.DirectoryStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await getattr(stub, method)(request_, timeout=DEADLINE_S)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert words in caught.value.details()
        assert not (await stub.Nodes(pb.NodesRequest(), timeout=DEADLINE_S)).nodes


async def test_a_restarted_controller_asks_for_everything_again():
    async with served() as server:
        address = server.address
        directory = RemoteDirectory(address, timeout_s=2.0)
        await directory.join(record(), TTL_S)
        await directory.announce("a", 1, dram(keys(3)), [])
        assert shown(await directory.locate(keys(3))) == [HELD] * 3
    for call in (directory.join(record(), TTL_S), directory.locate(keys(3)), directory.announce("a", 1, dram(keys(1)), [])):
        with pytest.raises(DirectoryError, match="the directory at"):
            await call
    async with served(address):
        known = []

        async def joined():
            try:
                known.append(await directory.join(record(), TTL_S))
            except DirectoryError:
                return False
            return True

        await until(joined)
        await until(joined)
        assert known == [False, True]
        await directory.announce("a", 1, dram(keys(3)), [])
        assert shown(await directory.locate(keys(3))) == [HELD] * 3
        await directory.close()


async def test_a_stalled_controller_costs_one_deadline_and_then_nothing():
    async with served() as server, Proxy(int(server.address.rpartition(":")[2])) as proxy:
        directory = RemoteDirectory(f"127.0.0.1:{proxy.port}", timeout_s=0.5)

        async def answers():
            try:
                return await directory.locate(keys(3)) is not None
            except DirectoryError:
                return False

        await until(answers)
        proxy.stall()
        refused = 0
        for _ in range(200):
            try:
                await directory.locate(keys(3))
            except DirectoryError as error:
                refused += "left alone" in error.message
        assert refused > 150
        proxy.flow()
        await until(answers)
        await directory.close()


async def test_an_answer_that_makes_no_sense_is_a_miss():
    class Liar(directory_pb2_grpc.DirectoryServicer):
        reply = pb.LocateReply()

        async def Locate(self, request, context):
            return self.reply

        async def Nodes(self, request, context):
            return pb.NodesReply(nodes=[pb.NodeRecord()])

    liar = Liar()
    server = grpc.aio.server()
    directory_pb2_grpc.add_DirectoryServicer_to_server(liar, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    directory = RemoteDirectory(f"127.0.0.1:{port}", timeout_s=DEADLINE_S)
    for liar.reply in (
        pb.LocateReply(nodes=[NODE], runs=[pb.HolderRun(blocks=9, nodes=[0], tiers=[0])]),
        pb.LocateReply(nodes=[NODE], runs=[pb.HolderRun(blocks=1, nodes=[1], tiers=[0])]),
        pb.LocateReply(nodes=[NODE], runs=[pb.HolderRun(blocks=1, nodes=[0], tiers=[])]),
        pb.LocateReply(nodes=[NODE], runs=[pb.HolderRun(blocks=1, nodes=[0], tiers=[7])]),
        pb.LocateReply(nodes=[pb.NodeRecord()]),
    ):
        with pytest.raises(DirectoryError, match="answered"):
            await directory.locate(keys(3))
    with pytest.raises(DirectoryError, match="answered"):
        await directory.nodes()
    with pytest.raises(DirectoryError):
        await directory.join(record(), TTL_S)  # not offered there
    await directory.close()
    await server.stop(None)


async def test_the_configuration_chooses():
    chosen = [
        open_directory(StoreConfig(), "", "127.0.0.1:1"),
        open_directory(StoreConfig(), "redis://127.0.0.1:1", "127.0.0.1:1"),
    ]
    assert [type(directory) for directory in chosen] == [RemoteDirectory, RedisDirectory]
    for directory in chosen:
        with pytest.raises(DirectoryError):
            await directory.locate(keys(1))
    await asyncio.gather(*(directory.close() for directory in chosen))
