"""Dataclass ⇄ protobuf, both ways, nothing else. Inner code never sees a message.

`X_from_pb` raises InvalidRequestError when a message cannot be a value of ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict

from core.blocks import KEY_BYTES, BlockRecord, Closing, KvLayout, KvSource, KvTicket
from core.cost_model import Fit, StepCost
from core.errors import InvalidRequestError
from core.kv_changes import KvChanges
from core.request import AttemptKey, AttemptTiming, FinishReason, TokenEvent, WorkerRole, WorkItem
from tandem._convert import sampling_to_pb as sampling_to_pb  # the SDK sends the same message
from tandem.sampling import SamplingParams
from tandem.v1 import cluster_pb2 as cluster
from tandem.v1 import common_pb2 as common
from tandem.v1 import kv_pb2 as kv

_FINISH = {
    FinishReason.STOP: common.FINISH_REASON_STOP,
    FinishReason.LENGTH: common.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: common.FINISH_REASON_CANCELLED,
    FinishReason.ERROR: common.FINISH_REASON_ERROR,
}
_FINISH_BACK = {number: reason for reason, number in _FINISH.items()}
_ROLE = {
    WorkerRole.PREFILL: common.WORKER_ROLE_PREFILL,
    WorkerRole.DECODE: common.WORKER_ROLE_DECODE,
    WorkerRole.COLOCATED: common.WORKER_ROLE_COLOCATED,
    WorkerRole.STORE: common.WORKER_ROLE_STORE,
    WorkerRole.ROUTER: common.WORKER_ROLE_ROUTER,
}
_ROLE_BACK = {number: role for role, number in _ROLE.items()}


def each_event(message: common.SessionEvent) -> Iterator[common.SessionEvent]:
    """What one message of a session tells, event by event."""
    yield message
    yield from message.more


def each_command(message: common.SessionCommand) -> Iterator[common.SessionCommand]:
    """What one message of a session asks for, command by command."""
    yield message
    yield from message.more


def finish_to_pb(reason: FinishReason | None) -> common.FinishReason:
    return common.FINISH_REASON_UNSPECIFIED if reason is None else _FINISH[reason]


def finish_from_pb(number: int) -> FinishReason | None:
    return _FINISH_BACK.get(number)  # type: ignore[call-overload, no-any-return]


def role_to_pb(role: WorkerRole) -> common.WorkerRole:
    return _ROLE[role]


def role_from_pb(number: int) -> WorkerRole:
    role: WorkerRole | None = _ROLE_BACK.get(number)  # type: ignore[call-overload]
    if role is None:
        raise InvalidRequestError(f"worker role {number} is not known here; are both sides the same version?")
    return role


def key_to_pb(key: AttemptKey) -> common.AttemptKey:
    return common.AttemptKey(request_id=key.request_id, attempt=key.attempt)


def key_from_pb(message: common.AttemptKey) -> AttemptKey:
    return AttemptKey(message.request_id, message.attempt)


def sampling_from_pb(message: common.SamplingParams) -> SamplingParams:
    def given(name: str) -> bool:
        return message.HasField(name)

    return SamplingParams(
        max_tokens=message.max_tokens if given("max_tokens") else None,
        temperature=message.temperature if given("temperature") else 1.0,
        top_k=message.top_k,
        top_p=message.top_p if given("top_p") else 1.0,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty if given("repetition_penalty") else 1.0,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=dict(message.logit_bias),
        seed=message.seed if given("seed") else None,
        n=message.n or 1,
        logprobs=message.logprobs if given("logprobs") else None,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
    )


def item_to_pb(item: WorkItem) -> common.WorkItem:
    return common.WorkItem(
        key=key_to_pb(item.key),
        token_ids=item.token_ids,
        prompt_len=item.prompt_len,
        sampling=sampling_to_pb(item.sampling),
        choice=item.choice,
        eos_token_ids=item.eos_token_ids,
        cache_salt=item.cache_salt,
        remaining_s=item.remaining_s,
    )


def item_from_pb(message: common.WorkItem) -> WorkItem:
    if not 0 < message.prompt_len <= len(message.token_ids):
        raise InvalidRequestError(f"prompt_len {message.prompt_len} does not fit {len(message.token_ids)} token ids")
    sampling = sampling_from_pb(message.sampling)
    if sampling.seed is None or sampling.max_tokens is None:
        raise InvalidRequestError("a work item needs its seed and max_tokens resolved by the router")
    return WorkItem(
        key=key_from_pb(message.key),
        token_ids=tuple(message.token_ids),
        prompt_len=message.prompt_len,
        sampling=sampling,
        choice=message.choice,
        eos_token_ids=tuple(message.eos_token_ids),
        cache_salt=message.cache_salt,
        remaining_s=message.remaining_s,
    )


def layout_to_pb(layout: KvLayout) -> common.KvLayout:
    return common.KvLayout(
        fingerprint=layout.fingerprint,
        dtype=layout.dtype,
        num_layers=layout.num_layers,
        kv_heads=layout.kv_heads,
        head_dim=layout.head_dim,
        block_size=layout.block_size,
    )


def layout_from_pb(message: common.KvLayout) -> KvLayout:
    return KvLayout(
        fingerprint=message.fingerprint,
        dtype=message.dtype,
        num_layers=message.num_layers,
        kv_heads=message.kv_heads,
        head_dim=message.head_dim,
        block_size=message.block_size,
    )


def source_to_pb(source: KvSource) -> common.KvSource:
    return common.KvSource(
        worker_id=source.worker_id,
        epoch=source.epoch,
        grpc_address=source.grpc_address,
        host_id=source.host_id,
        arena_path=source.arena_path,
        num_blocks=source.num_blocks,
        transports=source.transports,
        tcp_address=source.tcp_address,
    )


def source_from_pb(message: common.KvSource) -> KvSource:
    return KvSource(
        worker_id=message.worker_id,
        epoch=message.epoch,
        grpc_address=message.grpc_address,
        host_id=message.host_id,
        arena_path=message.arena_path,
        num_blocks=message.num_blocks,
        transports=tuple(message.transports),
        tcp_address=message.tcp_address,
    )


def ticket_to_pb(ticket: KvTicket) -> common.KvTicket:
    return common.KvTicket(
        key=key_to_pb(ticket.key),
        layout=layout_to_pb(ticket.layout),
        source=source_to_pb(ticket.source),
        lease_s=ticket.lease_s,
        codec=ticket.codec,
    )


def ticket_from_pb(message: common.KvTicket) -> KvTicket:
    return KvTicket(
        key=key_from_pb(message.key),
        layout=layout_from_pb(message.layout),
        source=source_from_pb(message.source),
        lease_s=message.lease_s,
        codec=message.codec,
    )


def token_to_pb(token: TokenEvent) -> common.GeneratedToken:
    return common.GeneratedToken(
        key=key_to_pb(token.key),
        position=token.position,
        token_id=token.token_id,
        logprob=token.logprob,
        top_logprobs=[common.TopLogprob(token_id=i, logprob=p) for i, p in token.top_logprobs],
        finish_reason=finish_to_pb(token.finish_reason),
    )


def token_from_pb(message: common.GeneratedToken) -> TokenEvent:
    return TokenEvent(
        key=key_from_pb(message.key),
        position=message.position,
        token_id=message.token_id,
        logprob=message.logprob if message.HasField("logprob") else None,
        top_logprobs=tuple((top.token_id, top.logprob) for top in message.top_logprobs),
        finish_reason=finish_from_pb(message.finish_reason),
    )


def timing_to_pb(timing: AttemptTiming) -> common.AttemptTiming:
    return common.AttemptTiming(
        queue_s=timing.queue_s,
        prefill_s=timing.prefill_s,
        handoff_wait_s=timing.handoff_wait_s,
        transfer_s=timing.transfer_s,
        transfer_exposed_s=timing.transfer_exposed_s,
        transfer_bytes=timing.transfer_bytes,
        transport=timing.transport,
    )


def timing_from_pb(message: common.AttemptTiming) -> AttemptTiming:
    return AttemptTiming(
        queue_s=message.queue_s,
        prefill_s=message.prefill_s,
        handoff_wait_s=message.handoff_wait_s,
        transfer_s=message.transfer_s,
        transfer_exposed_s=message.transfer_exposed_s,
        transfer_bytes=message.transfer_bytes,
        transport=message.transport,
    )


def record_to_pb(record: BlockRecord) -> kv.BlockRecord:
    return kv.BlockRecord(
        index=record.index,
        key=record.key,
        block_id=record.block_id,
        generation=record.generation,
        digest=record.digest,
        num_tokens=record.num_tokens,
    )


def record_from_pb(message: kv.BlockRecord) -> BlockRecord:
    if len(message.key) not in (0, KEY_BYTES):
        raise InvalidRequestError(f"a block key has {KEY_BYTES} bytes or none, got {len(message.key)}")
    return BlockRecord(
        index=message.index,
        key=message.key,
        block_id=message.block_id,
        generation=message.generation,
        digest=message.digest,
        num_tokens=message.num_tokens,
    )


def changes_to_pb(changes: KvChanges) -> common.KvChanges:
    return common.KvChanges(**asdict(changes))


def changes_from_pb(message: common.KvChanges) -> KvChanges:
    """Raises InvalidRequestError for what no node of ours sends."""
    return KvChanges(
        message.stream,
        message.sequence,
        message.added_dram,
        message.added_disk,
        message.removed_dram,
        message.removed_disk,
    ).check()


def fit_to_pb(fit: Fit) -> cluster.StepCost:
    return cluster.StepCost(**asdict(fit.cost), samples=fit.samples, median_error=fit.median_error, p90_error=fit.p90_error)


def fit_from_pb(message: cluster.StepCost) -> Fit:
    """Raises InvalidRequestError for coefficients that cannot be."""
    values = (
        message.base_s,
        message.prefill_token_s,
        message.prefill_pair_s,
        message.decode_row_s,
        message.decode_context_s,
    )
    if not all(math.isfinite(value) and value >= 0 for value in values) or not any(values):
        raise InvalidRequestError(f"a step cannot cost {values}: seconds per unit are finite, not negative, not all zero")
    return Fit(StepCost(*values), message.samples, message.median_error, message.p90_error)


def closing_to_pb(closing: Closing) -> kv.Closing:
    return kv.Closing(
        num_tokens=closing.num_tokens,
        generated=closing.generated,
        finished=closing.finished,
        prefill_s=closing.prefill_s,
    )


def closing_from_pb(message: kv.Closing) -> Closing:
    return Closing(
        num_tokens=message.num_tokens,
        generated=tuple(message.generated),
        finished=message.finished,
        prefill_s=message.prefill_s,
    )
