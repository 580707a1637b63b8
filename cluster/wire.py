"""Snapshots ⇄ protobuf, both ways, nothing else."""

from __future__ import annotations

from cluster.report import ClusterSnapshot, Member
from core.report_wire import report_from_pb, report_to_pb
from tandem.v1 import cluster_pb2 as pb


def snapshot_to_pb(snapshot: ClusterSnapshot) -> pb.ClusterSnapshot:
    return pb.ClusterSnapshot(
        version=snapshot.version,
        workers=[report_to_pb(member.report) for member in snapshot.members],
        ages_s=[member.age_s for member in snapshot.members],
        model=snapshot.model,
        tandem_version=snapshot.tandem_version,
    )


def snapshot_from_pb(message: pb.ClusterSnapshot) -> ClusterSnapshot:
    members = (Member(report_from_pb(worker), age_s) for worker, age_s in zip(message.workers, message.ages_s, strict=True))
    return ClusterSnapshot(message.version, tuple(members), message.model, message.tandem_version)
