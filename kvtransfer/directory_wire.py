"""Node records and located runs ⇄ protobuf, both ways, nothing else. `X_from_pb` raises InvalidRequestError."""

from __future__ import annotations

from google.protobuf.message import DecodeError

from core.errors import InvalidRequestError
from core.wire import layout_from_pb, layout_to_pb, role_from_pb, role_to_pb, source_from_pb, source_to_pb
from kvtransfer.directory import Holder, NodeRecord, Runs, Tier
from tandem.v1 import directory_pb2 as pb
from tandem.v1 import kv_pb2 as kv

RECORD_BYTES_MAX = 4096
_TIER = {Tier.DRAM: kv.TIER_DRAM, Tier.DISK: kv.TIER_DISK}


def node_to_pb(record: NodeRecord) -> pb.NodeRecord:
    return pb.NodeRecord(
        source=source_to_pb(record.source),
        layout=layout_to_pb(record.layout) if record.layout is not None else None,
        role=role_to_pb(record.role),
    )


def node_from_pb(message: pb.NodeRecord) -> NodeRecord:
    if not message.source.worker_id or not message.source.grpc_address:
        raise InvalidRequestError("a node of the KV plane needs an id and an address")
    if message.ByteSize() > RECORD_BYTES_MAX:
        raise InvalidRequestError(f"the record of a node has {message.ByteSize()} bytes; at most {RECORD_BYTES_MAX} are kept")
    return NodeRecord(
        source=source_from_pb(message.source),
        layout=layout_from_pb(message.layout) if message.HasField("layout") else None,
        role=role_from_pb(message.role),
    )


def node_to_bytes(record: NodeRecord) -> bytes:
    return node_to_pb(record).SerializeToString()


def node_from_bytes(data: bytes) -> NodeRecord:
    try:
        return node_from_pb(pb.NodeRecord.FromString(data))
    except DecodeError:
        raise InvalidRequestError("the record of a node is damaged") from None


def runs_to_pb(found: Runs) -> pb.LocateReply:
    places = {record.source.worker_id: place for place, record in enumerate(found.nodes)}
    return pb.LocateReply(
        nodes=[node_to_pb(record) for record in found.nodes],
        runs=[
            pb.HolderRun(blocks=count, nodes=[places[h.worker_id] for h in holders], tiers=[_TIER[h.tier] for h in holders])
            for count, holders in found.runs
        ],
    )


def runs_from_pb(message: pb.LocateReply, keys: int) -> Runs:
    """`keys`: how many were asked for; an answer about more is refused."""
    nodes = [node_from_pb(node) for node in message.nodes]
    runs = [(run.blocks, _holders(nodes, run)) for run in message.runs]
    if sum(count for count, _ in runs) > keys:
        raise InvalidRequestError(f"an answer about more keys than the {keys} asked for")
    return Runs(nodes, runs)


def _holders(nodes: list[NodeRecord], run: pb.HolderRun) -> tuple[Holder, ...]:
    if len(run.nodes) != len(run.tiers) or any(place >= len(nodes) for place in run.nodes):
        raise InvalidRequestError("a run names holders that the answer does not describe")
    try:
        tiers = [Tier(tier) for tier in run.tiers]
    except ValueError:
        raise InvalidRequestError("a run names a tier that is not known here; are both sides the same version?") from None
    sources = [nodes[place].source for place in run.nodes]
    return tuple(Holder(source.worker_id, source.epoch, tier) for source, tier in zip(sources, tiers, strict=True))
