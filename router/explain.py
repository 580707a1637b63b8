"""What is kept of a decision, as messages and as the short form that fits a header."""

from __future__ import annotations

import json
from typing import Any

from google.protobuf.json_format import MessageToDict

from router.decisions import Explanation, Made, Outcome
from router.frontend_types import FrontDoor, Placement, Timing
from router.policy import Candidate, Pair
from tandem.errors import NotFoundError
from tandem.v1 import inference_pb2 as pb

HEADER = "x-tandem-explain"
"""Sent with any value but 0, it asks for a header (gRPC: trailing metadata) of the same name in the answer."""
_HEADER_CANDIDATES = 2
_DIGITS = 6


def wanted(value: str | None) -> bool:
    """Whether a request's header of this value asks for an explanation."""
    return value is not None and value.strip().lower() not in ("", "0", "false")


def header_of(front: FrontDoor, request_id: str) -> str | None:
    """One line of ASCII JSON: the last decision with its two best candidates, and the outcome once there is one."""
    try:
        known = front.explain(request_id)
    except NotFoundError:
        return None
    message = explanation_to_pb(known)
    del message.decisions[:-1]
    for decision in message.decisions:
        del decision.candidates[_HEADER_CANDIDATES:]
    message.outcome.message = message.outcome.message[:200]
    if known.outcome is None:
        message.ClearField("outcome")
    return json.dumps(_rounded(MessageToDict(message, preserving_proto_field_name=True)), separators=(",", ":"))


def explanation_to_pb(known: Explanation) -> pb.ExplainResponse:
    return pb.ExplainResponse(
        request_id=known.request_id,
        policy=known.policy,
        slo_class=known.slo_class,
        ttft_slo_s=known.slo.ttft_s,
        tbt_slo_s=known.slo.tbt_s,
        tpot_slo_s=known.slo.tpot_s,
        prompt_tokens=known.prompt_tokens,
        output_tokens=known.output_tokens,
        decisions=map(_decision, known.decisions),
        forgotten=known.forgotten,
        outcome=_outcome(known.outcome) if known.outcome is not None else None,
    )


def timing_to_pb(timing: Timing) -> pb.Timing:
    return pb.Timing(
        queue_s=timing.queue_s,
        prefill_s=timing.prefill_s,
        handoff_wait_s=timing.handoff_wait_s,
        transfer_s=timing.transfer_s,
        first_decode_s=timing.first_decode_s,
        ttft_s=timing.ttft_s,
        tpot_s=timing.tpot_s,
        total_s=timing.total_s,
        transfer_exposed_s=timing.transfer_exposed_s,
    )


def placement_to_pb(placement: Placement) -> pb.Placement:
    return pb.Placement(prefill=placement.prefill, decode=placement.decode)


def _decision(made: Made) -> pb.Decision:
    return pb.Decision(
        at_s=made.at_s,
        placement=_pair(made.place) if made.place is not None else None,
        reason=made.reason,
        candidates=map(_candidate, made.candidates),
    )


def _candidate(candidate: Candidate) -> pb.Candidate:
    return pb.Candidate(
        placement=_pair(candidate.pair),
        ttft_s=candidate.ttft_s,
        overhead_s=candidate.overhead_s,
        queue_s=candidate.queue_s,
        prefill_s=candidate.prefill_s,
        held_s=candidate.held_s,
        transfer_s=candidate.transfer_s,
        gap_s=candidate.gap_s,
        tpot_s=candidate.tpot_s,
        score=candidate.score,
        reason=candidate.reason,
    )


def _outcome(outcome: Outcome) -> pb.Outcome:
    return pb.Outcome(
        finish=outcome.finish,
        message=outcome.message,
        timing=timing_to_pb(outcome.timing),
        tokens=outcome.tokens,
        cached_tokens=outcome.cached_tokens,
        failovers=outcome.failovers,
        placement=placement_to_pb(outcome.placement),
    )


def _pair(pair: Pair) -> pb.Placement:
    """One worker that does it all is named twice, as in `Finished`."""
    return pb.Placement(prefill=pair.prefill or pair.decode, decode=pair.decode)


def _rounded(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: _rounded(value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [_rounded(value) for value in tree]
    return round(tree, _DIGITS) if isinstance(tree, float) else tree
