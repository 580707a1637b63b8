"""Calls to the nodes of a cluster's KV plane, found through its admin address."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc

from cli import admin
from cluster.report import ClusterSnapshot
from core.blocks import KEY_BYTES, BlockKey, BlockRecord
from core.report import WorkerState
from core.request import AttemptKey, WorkerRole
from core.wire import key_to_pb, record_from_pb
from kvtransfer.codec import NO_DIGEST, digest_of
from kvtransfer.holds import HOLD_KEYS_MAX
from tandem._convert import error_from_rpc
from tandem.errors import InvalidRequestError, NotFoundError, TandemError, UnavailableError
from tandem.v1 import kv_pb2 as pb
from tandem.v1 import kv_pb2_grpc as stubs

TIMEOUT_S = 10.0
SLOW_TIMEOUT_S = 600.0  # of what reads every block
LEASE_S = 10.0
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class KvNodeAddress:
    worker_id: str
    role: WorkerRole
    epoch: int
    grpc_address: str


@dataclass(frozen=True, slots=True)
class Found:
    """A block's bytes, as a node gave them."""

    node: str
    record: BlockRecord
    data: bytes


def nodes_of(snapshot: ClusterSnapshot, only: str | None = None) -> list[KvNodeAddress]:
    """Nodes with blocks, stores first. Raises NotFoundError when `only` is none of them."""
    alive = (WorkerState.READY, WorkerState.DRAINING)
    reports = [m.report for m in snapshot.members if m.report.role is not WorkerRole.ROUTER and m.report.state in alive]
    found = [KvNodeAddress(r.worker_id, r.role, r.epoch, r.grpc_address) for r in reports if only in (None, r.worker_id)]
    if only is not None and not found:
        raise NotFoundError(f"no node {only} with blocks is ready; `tandem status` lists them")
    return sorted(found, key=lambda node: (node.role is not WorkerRole.STORE, node.worker_id))


def find_nodes(grpc_address: str | None, admin_address: str | None, only: str | None = None) -> list[KvNodeAddress]:
    from cli.running import admin_address as looked_up

    return nodes_of(admin.status(looked_up(grpc_address, admin_address)), only)


def parse_key(text: str) -> BlockKey:
    """Raises InvalidRequestError for what is no key in hexadecimal."""
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise InvalidRequestError(
            f"a block key is {2 * KEY_BYTES} hexadecimal digits, as `tandem kv ls` shows them; got {text!r}"
        )
    return key


def stat(node: KvNodeAddress) -> Any:
    return _ask(node, lambda stub: stub.Stat(pb.StatRequest(), timeout=TIMEOUT_S))


def entries(node: KvNodeAddress, limit: int) -> list[Any]:
    """At most `limit`, all for 0."""
    request = pb.ListRequest(limit=limit)
    return _ask(node, lambda stub: [e for reply in stub.List(request, timeout=SLOW_TIMEOUT_S) for e in reply.entries])


def verify(node: KvNodeAddress, keys: Sequence[BlockKey]) -> Any:
    return _ask(node, lambda stub: stub.Verify(pb.VerifyRequest(keys=keys), timeout=SLOW_TIMEOUT_S))


def evict(node: KvNodeAddress, keys: Sequence[BlockKey] | None) -> int:
    """All blocks for None."""
    request = pb.EvictRequest(all=True) if keys is None else pb.EvictRequest(keys=keys)
    return int(_ask(node, lambda stub: stub.Evict(request, timeout=SLOW_TIMEOUT_S)).evicted)


def pin(node: KvNodeAddress, keys: Sequence[BlockKey]) -> tuple[int, int, int]:
    """How many of `keys` are pinned now, how many blocks are there in all, and how many may be.

    Raises InvalidRequestError when those would be more than may be: nothing more is pinned then.
    """
    done: list[BlockKey] = []
    reply = pb.PinReply()
    count = 0
    with _stub(node) as stub:
        for start in range(0, len(keys), HOLD_KEYS_MAX):
            part = keys[start : start + HOLD_KEYS_MAX]
            try:
                reply = stub.Pin(pb.PinRequest(keys=part), timeout=TIMEOUT_S)
            except grpc.RpcError:
                for begin in range(0, len(done), HOLD_KEYS_MAX):
                    stub.Pin(pb.PinRequest(keys=done[begin : begin + HOLD_KEYS_MAX], unpin=True), timeout=TIMEOUT_S)
                raise
            done += part
            count += reply.pinned
    return count, reply.pinned_blocks, reply.pinned_max


def unpin(node: KvNodeAddress, keys: Sequence[BlockKey] | None) -> tuple[int, int, int]:
    """As `pin`, for blocks that were pinned until now; all of them for None."""
    requests = [pb.PinRequest(unpin=True, all=True)]
    if keys is not None:
        starts = range(0, len(keys), HOLD_KEYS_MAX)
        requests = [pb.PinRequest(unpin=True, keys=keys[start : start + HOLD_KEYS_MAX]) for start in starts]
    with _stub(node) as stub:
        replies = [stub.Pin(request, timeout=TIMEOUT_S) for request in requests]
    return sum(reply.pinned for reply in replies), replies[-1].pinned_blocks, replies[-1].pinned_max


def holds(node: KvNodeAddress, keys: Sequence[BlockKey]) -> int:
    """How many of `keys` are at a node, its disk included (which brings them up)."""
    count = 0
    for start in range(0, len(keys), HOLD_KEYS_MAX):
        with _held(node, keys[start : start + HOLD_KEYS_MAX]) as (_, records, _holder):
            count += len(records)
    return count


def get(node: KvNodeAddress, key: BlockKey) -> Found | None:
    """A block's bytes, checked against its digest. Raises TandemError for such as fail it."""
    with _held(node, [key]) as (stub, records, holder):
        if not records:
            return None
        request = pb.ReadRequest(
            key=key_to_pb(holder),
            epoch=node.epoch,
            indices=[record.index for record in records],
            block_ids=[record.block_id for record in records],
            generations=[record.generation for record in records],
        )
        data = b"".join(chunk.data for chunk in stub.Read(request, timeout=TIMEOUT_S))
        record = record_from_pb(records[0])
    if record.digest != NO_DIGEST and digest_of(_array(data)) != record.digest:
        raise TandemError(f"{node.worker_id} sent other bytes than its digest says; `tandem kv verify` drops the block there")
    return Found(node.worker_id, record, data)


@contextmanager
def _held(node: KvNodeAddress, keys: Sequence[BlockKey]) -> Iterator[tuple[Any, list[Any], AttemptKey]]:
    """The stub and the records of what is held inside the block; nothing where the node has not seen a block yet."""
    holder = AttemptKey(f"hold/cli-{os.getpid()}/1", 1)
    with _stub(node) as stub:
        layout = stub.Stat(pb.StatRequest(), timeout=TIMEOUT_S)
        if not layout.HasField("layout"):
            yield stub, [], holder
            return
        request = pb.HoldRequest(holder=key_to_pb(holder), epoch=node.epoch, layout=layout.layout, keys=keys, lease_s=LEASE_S)
        reply = stub.Hold(request, timeout=TIMEOUT_S)
        try:
            yield stub, list(reply.records), holder
        finally:
            stub.Drop(pb.DropRequest(holder=key_to_pb(holder), epoch=node.epoch), timeout=TIMEOUT_S)


def _ask(node: KvNodeAddress, call: Callable[[Any], _T]) -> _T:
    with _stub(node) as stub:
        return call(stub)


@contextmanager
def _stub(node: KvNodeAddress) -> Iterator[Any]:
    with grpc.insecure_channel(node.grpc_address, options=(("grpc.enable_http_proxy", 0),)) as channel:
        try:
            yield stubs.KvStub(channel)  # type: ignore[no-untyped-call]
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise UnavailableError(f"{node.worker_id} does not answer at {node.grpc_address}: {error.details()}") from None
            raise error_from_rpc(error, node.grpc_address) from None


def _array(data: bytes) -> Any:
    import numpy as np

    return np.frombuffer(data, np.uint8)
