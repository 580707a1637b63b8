"""A report reaches whoever watches as it was sent: the controller passes all of it on."""

import pytest
from google.protobuf.descriptor import FieldDescriptor

from cluster.report import ClusterSnapshot, Member
from cluster.wire import snapshot_from_pb, snapshot_to_pb
from core.errors import InvalidRequestError
from core.report_wire import report_from_pb, report_to_pb
from tandem.v1 import cluster_pb2 as pb


def filled(message, start=1):
    """Every field set, each to another value."""
    for number, field in enumerate(message.DESCRIPTOR.fields, start):
        match field.type:
            case FieldDescriptor.TYPE_MESSAGE:
                filled(getattr(message, field.name), 10 * number)
            case FieldDescriptor.TYPE_ENUM:
                setattr(message, field.name, field.enum_type.values[-1].number)
            case FieldDescriptor.TYPE_STRING:
                setattr(message, field.name, "float32" if field.name == "dtype" else f"text {number}")
            case FieldDescriptor.TYPE_BYTES:
                setattr(message, field.name, bytes([number % 256]) * 16)
            case FieldDescriptor.TYPE_BOOL:
                setattr(message, field.name, True)
            case _:
                setattr(message, field.name, number)
    return message


def test_nothing_of_a_report_is_lost_on_its_way():
    sent = filled(pb.WorkerReport())
    assert all(sent.HasField(f.name) if f.message_type else getattr(sent, f.name) for f in sent.DESCRIPTOR.fields)
    report = report_from_pb(sent)
    assert report_to_pb(report) == sent
    snapshot = ClusterSnapshot(3, (Member(report, 0.5),), "demo", "1.0")
    assert snapshot_from_pb(snapshot_to_pb(snapshot)) == snapshot


@pytest.mark.parametrize("field", ["worker_id", "state", "role"])
def test_a_report_of_another_version_is_refused(field):
    message = filled(pb.WorkerReport())
    message.ClearField(field)
    with pytest.raises(InvalidRequestError):
        report_from_pb(message)
