"""Messages of `Inference/Explain` as plain values."""

from __future__ import annotations

from tandem._convert import placement_from_pb, timing_from_pb
from tandem.explanation import Candidate, Decision, Explanation, Outcome
from tandem.v1 import inference_pb2 as inference


def explanation_from_pb(message: inference.ExplainResponse) -> Explanation:
    return Explanation(
        request_id=message.request_id,
        policy=message.policy,
        slo_class=message.slo_class,
        ttft_slo_s=message.ttft_slo_s if message.HasField("ttft_slo_s") else None,
        tbt_slo_s=message.tbt_slo_s if message.HasField("tbt_slo_s") else None,
        tpot_slo_s=message.tpot_slo_s if message.HasField("tpot_slo_s") else None,
        prompt_tokens=message.prompt_tokens,
        output_tokens=message.output_tokens,
        decisions=tuple(map(_decision, message.decisions)),
        forgotten=message.forgotten,
        outcome=_outcome(message.outcome) if message.HasField("outcome") else None,
    )


def _decision(message: inference.Decision) -> Decision:
    placement = placement_from_pb(message.placement) if message.HasField("placement") else None
    return Decision(message.at_s, placement, message.reason, tuple(map(_candidate, message.candidates)))


def _candidate(message: inference.Candidate) -> Candidate:
    return Candidate(
        placement=placement_from_pb(message.placement),
        ttft_s=message.ttft_s,
        overhead_s=message.overhead_s,
        queue_s=message.queue_s,
        prefill_s=message.prefill_s,
        held_s=message.held_s,
        transfer_s=message.transfer_s,
        gap_s=message.gap_s,
        tpot_s=message.tpot_s,
        score=message.score,
        reason=message.reason,
    )


def _outcome(message: inference.Outcome) -> Outcome:
    return Outcome(
        finish=message.finish,
        message=message.message,
        timing=timing_from_pb(message.timing),
        tokens=message.tokens,
        cached_tokens=message.cached_tokens,
        failovers=message.failovers,
        placement=placement_from_pb(message.placement),
    )
