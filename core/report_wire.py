"""Reports ⇄ protobuf, both ways, nothing else."""

from __future__ import annotations

from core import wire
from core.errors import InvalidRequestError
from core.inventory import BlockCounts
from core.report import Demand, ModelFacts, RoleProposal, WorkerReport, WorkerState
from tandem.v1 import cluster_pb2 as pb

_STATE = {
    WorkerState.STARTING: pb.WORKER_STATE_STARTING,
    WorkerState.READY: pb.WORKER_STATE_READY,
    WorkerState.DRAINING: pb.WORKER_STATE_DRAINING,
    WorkerState.DEAD: pb.WORKER_STATE_DEAD,
}
_STATE_BACK = {number: state for state, number in _STATE.items()}


def report_to_pb(report: WorkerReport) -> pb.WorkerReport:
    return pb.WorkerReport(
        worker_id=report.worker_id,
        role=wire.role_to_pb(report.role),
        epoch=report.epoch,
        sequence=report.sequence,
        state=_STATE[report.state],
        pid=report.pid,
        node=report.node,
        host_id=report.host_id,
        grpc_address=report.grpc_address,
        metrics_address=report.metrics_address,
        http_address=report.http_address,
        peer_address=report.peer_address,
        blocks=pb.BlockCounts(**report.blocks._asdict()),
        leases_open=report.leases_open,
        running=report.running,
        waiting=report.waiting,
        waiting_tokens=report.waiting_tokens,
        context_tokens=report.context_tokens,
        step_cost=wire.fit_to_pb(report.step_cost) if report.step_cost else None,
        layout=wire.layout_to_pb(report.layout) if report.layout else None,
        model=pb.ModelInfo(**report.model._asdict()) if report.model else None,
        proposal=_proposal_to_pb(report.proposal) if report.proposal else None,
        demand=pb.Demand(**report.demand._asdict()) if report.demand else None,
        progress=report.progress,
        detail=report.detail,
    )


def report_from_pb(message: pb.WorkerReport) -> WorkerReport:
    """Raises InvalidRequestError for one of another version: unknown role or state, a cost that cannot be."""
    state = _STATE_BACK.get(message.state)
    if not message.worker_id or state is None:
        raise InvalidRequestError("a report needs worker_id and state; are both sides the same version?")
    blocks, model = message.blocks, message.model
    return WorkerReport(
        worker_id=message.worker_id,
        role=wire.role_from_pb(message.role),
        epoch=message.epoch,
        sequence=message.sequence,
        state=state,
        pid=message.pid,
        node=message.node,
        host_id=message.host_id,
        grpc_address=message.grpc_address,
        metrics_address=message.metrics_address,
        http_address=message.http_address,
        peer_address=message.peer_address,
        blocks=BlockCounts(blocks.total, blocks.free, blocks.cached, blocks.active),
        leases_open=message.leases_open,
        running=message.running,
        waiting=message.waiting,
        waiting_tokens=message.waiting_tokens,
        context_tokens=message.context_tokens,
        step_cost=wire.fit_from_pb(message.step_cost) if message.HasField("step_cost") else None,
        layout=wire.layout_from_pb(message.layout) if message.HasField("layout") else None,
        model=ModelFacts(model.name, model.max_model_len, model.vocab_size, model.path) if message.HasField("model") else None,
        proposal=_proposal_from_pb(message.proposal) if message.HasField("proposal") else None,
        demand=_demand_from_pb(message.demand) if message.HasField("demand") else None,
        progress=message.progress,
        detail=message.detail,
    )


def _demand_from_pb(message: pb.Demand) -> Demand:
    return Demand(
        message.requests,
        message.answered,
        message.prompt_tokens,
        message.prompt_squares,
        message.cached_tokens,
        message.answer_tokens,
        message.answer_squares,
    )


def _proposal_to_pb(proposal: RoleProposal) -> pb.RoleProposal:
    return pb.RoleProposal(target=proposal.target, role=wire.role_to_pb(proposal.role), reason=proposal.reason)


def _proposal_from_pb(message: pb.RoleProposal) -> RoleProposal:
    return RoleProposal(message.target, wire.role_from_pb(message.role), message.reason)
