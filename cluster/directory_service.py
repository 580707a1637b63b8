"""The Directory service on the admin address: the cluster's default directory, a LocalDirectory behind gRPC.

It lives and dies with the controller. A new one starts empty, and every node hears at its next `Join` that it has to announce
everything again.
"""

from __future__ import annotations

import math
from typing import Any

import grpc

from core.blocks import KEY_BYTES
from core.clock import Clock
from core.errors import InvalidRequestError
from core.service import Registration
from kvtransfer.directory import ANNOUNCE_KEYS_MAX, LOCATE_KEYS_MAX, Delta
from kvtransfer.directory_wire import node_from_pb, node_to_pb, runs_to_pb
from kvtransfer.local_directory import LocalDirectory
from kvtransfer.rpc import abort
from tandem.errors import TandemError
from tandem.v1 import directory_pb2 as pb
from tandem.v1 import directory_pb2_grpc as pb_grpc

TTL_MAX_S = 3600.0

_Context = grpc.aio.ServicerContext[Any, Any]


class DirectoryServicer(pb_grpc.DirectoryServicer):
    def __init__(self, table: LocalDirectory, clock: Clock) -> None:
        self._table = table
        self._clock = clock

    async def Join(self, request: pb.JoinRequest, context: _Context) -> pb.JoinReply:
        try:
            if not (math.isfinite(request.ttl_s) and 0 < request.ttl_s <= TTL_MAX_S):
                raise InvalidRequestError(f"ttl_s must be above 0 and within {TTL_MAX_S:g}, got {request.ttl_s:g}")
            known = self._table.join(node_from_pb(request.node), request.ttl_s, self._clock.now())
        except TandemError as error:
            await abort(context, error)
        return pb.JoinReply(known=known)

    async def Leave(self, request: pb.LeaveRequest, context: _Context) -> pb.LeaveReply:
        self._table.leave(request.worker_id, request.epoch, self._clock.now())
        return pb.LeaveReply()

    async def Announce(self, request: pb.AnnounceRequest, context: _Context) -> pb.AnnounceReply:
        delta = Delta(request.added_dram, request.added_disk, request.removed_dram, request.removed_disk)
        try:
            _check_keys(sum(map(len, delta)), ANNOUNCE_KEYS_MAX, *delta)
        except InvalidRequestError as error:
            await abort(context, error)
        return pb.AnnounceReply(known=self._table.announce(request.worker_id, request.epoch, delta, self._clock.now()))

    async def Locate(self, request: pb.LocateRequest, context: _Context) -> pb.LocateReply:
        try:
            _check_keys(len(request.keys), LOCATE_KEYS_MAX, request.keys)
        except InvalidRequestError as error:
            await abort(context, error)
        return runs_to_pb(self._table.locate(request.keys, self._clock.now()))

    async def Nodes(self, request: pb.NodesRequest, context: _Context) -> pb.NodesReply:
        return pb.NodesReply(nodes=[node_to_pb(record) for record in self._table.nodes(self._clock.now())])


def directory_registration(table: LocalDirectory, clock: Clock) -> Registration:
    return Registration("tandem.v1.Directory", pb_grpc.add_DirectoryServicer_to_server, DirectoryServicer(table, clock))


def _check_keys(total_bytes: int, keys_max: int, *packed: bytes) -> None:
    if total_bytes > keys_max * KEY_BYTES:
        raise InvalidRequestError(f"{total_bytes // KEY_BYTES} keys in one message; send at most {keys_max}")
    if any(len(keys) % KEY_BYTES for keys in packed):
        raise InvalidRequestError(f"keys lie one after another, {KEY_BYTES} bytes each; the last one is cut off")
