"""What one role of a cluster does to requests, in closed form: who meets a limit, and how long they stay. Deciding code.

Prompts wait in a queue with several servers and Kingman's tail (`closed_forms`); the running batch of a decode replica is what
Little's law leaves at the step time it causes itself; a request's slowest tenth of gaps sees that batch one standard deviation
above its mean, and the hand-over of its KV. Colocated replicas mix both: a share of steps carries a chunk of a prompt.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from cluster.closed_forms import wait_s
from cluster.planner_offers import Floats, Offer, Workload
from core.cost_model import StepCost
from core.request import Slo

ROUNDS = 40
"""For a batch to settle: longer steps make it larger, a larger one makes steps longer."""
BATCH_MAX = 1e5
STEP_S_MIN = 1e-6
"""No step is free, though costs that were learned from few of them may say so."""


class Side(NamedTuple):
    """Per request of the workload the probability to meet TTFT and TBT (1 where the role has no part in it), the share that
    memory holds, and the mean seconds that a request stays."""

    ttft: Floats
    tbt: Floats
    held: float
    stay_s: float


@lru_cache(maxsize=1024)
def prompt_s(offer: Offer, work: Workload) -> Floats:
    """Each prompt alone, in chunks of `offer.step_tokens`."""
    steps, tokens = _steps(offer), work.inputs
    pieces = np.ceil(tokens / offer.step_tokens)
    return np.asarray(pieces * steps.base_s + steps.prefill_token_s * tokens + steps.prefill_pair_s * tokens * (tokens + 1) / 2)


def answer_s(offer: Offer, work: Workload) -> float:
    """Machine time of a request's answer in a batch so full that nothing else counts."""
    steps = _steps(offer)
    return float(np.mean(work.outputs * (steps.decode_row_s + steps.decode_context_s * (work.inputs + work.outputs / 2))))


def prefill_side(offer: Offer, servers: float, rate_rps: float, work: Workload, slo: Slo) -> Side:
    service = prompt_s(offer, work)
    mean_s = float(np.mean(service))
    load = rate_rps * mean_s / servers
    waited = _waits(service, load, servers, work, slo)
    held = float(np.mean(work.inputs <= offer.kv_tokens))
    return Side(waited, np.ones_like(service), held, mean_s)


def decode_side(offer: Offer, servers: float, rate_rps: float, work: Workload, slo: Slo) -> Side:
    (row_s, square), base_s = _rows(offer, work), _steps(offer).base_s
    tokens = rate_rps / servers * work.mean_output
    spare = 1 - tokens * row_s
    batch = tokens * base_s / spare if spare > 0 else math.inf
    if batch > BATCH_MAX:
        return Side(np.ones_like(work.inputs), np.zeros_like(work.inputs), 0.0, 0.0)
    gap_s = base_s + max(1.0, batch) * row_s
    hand_over_s = offer.link.latency_s + work.inputs * offer.cost.kv_token_bytes / offer.link.bytes_per_s
    tbt = _within_tbt(gap_s, math.sqrt(batch * square), hand_over_s, work, slo)
    return Side(np.ones_like(tbt), tbt, _held(offer, batch, work), work.mean_output * gap_s)


def mixed_side(offer: Offer, servers: float, rate_rps: float, work: Workload, slo: Slo) -> Side:
    (row_s, square), base_s = _rows(offer, work), _steps(offer).base_s
    alone, rate = prompt_s(offer, work), rate_rps / servers
    pieces = np.ceil(work.inputs / offer.step_tokens)
    chunk_s = float(np.sum(alone) / np.sum(pieces))
    mean_pieces = float(np.mean(pieces))
    batch = load = share = 0.0
    for _ in range(ROUNDS):
        mixed_s, plain_s = chunk_s + batch * row_s, base_s + batch * row_s
        load = rate * mean_pieces * mixed_s
        if load >= 1 or batch > BATCH_MAX:
            nobody = np.zeros_like(alone)
            return Side(nobody, nobody, 0.0, 0.0)
        steps_per_s = load / mixed_s + (1 - load) / plain_s
        share = load / mixed_s / steps_per_s
        batch = (batch + rate * work.mean_output / steps_per_s) / 2
    mixed_s, plain_s = chunk_s + batch * row_s, base_s + batch * row_s
    gaps = np.maximum(work.outputs - 1, 1)
    slowest = np.ceil(gaps / 10)
    chunks = np.minimum(slowest, share * gaps)  # of the slowest gaps, those that carried a chunk
    tbt = _within_tbt(plain_s, math.sqrt(batch * square), chunks * (mixed_s - plain_s), work, slo)
    ttft = _waits(alone + pieces * batch * row_s, load, servers, work, slo)
    stay_s = float(np.mean(alone)) + work.mean_output / steps_per_s
    return Side(ttft, tbt, _held(offer, batch, work), stay_s)


def _steps(offer: Offer) -> StepCost:
    steps = offer.cost.steps
    return steps if steps.base_s >= STEP_S_MIN else replace(steps, base_s=STEP_S_MIN)


@lru_cache(maxsize=1024)
def _rows(offer: Offer, work: Workload) -> tuple[float, float]:
    """What a running row adds to a step, in the mean over the rows that run, and the mean of its square."""
    steps = _steps(offer)
    each = steps.decode_row_s + steps.decode_context_s * (work.inputs + work.outputs / 2)
    return float(np.average(each, weights=work.outputs)), float(np.average(each**2, weights=work.outputs))


def _held(offer: Offer, batch: float, work: Workload) -> float:
    """Probability that the running batch fits the memory, and that a request does by itself."""
    whole, mean_one, square_one = _wholes(work)
    mean = batch * mean_one
    spread = math.sqrt(max(1.0, batch * square_one))
    return float(np.mean(whole <= offer.kv_tokens)) * float(_normal(np.array((offer.kv_tokens - mean) / spread)))


@lru_cache(maxsize=64)
def _wholes(work: Workload) -> tuple[Floats, float, float]:
    """Tokens that each request comes to hold; the mean over those that run, and that of the square."""
    whole = work.inputs + work.outputs
    return whole, float(np.average(whole, weights=work.outputs)), float(np.average(whole**2, weights=work.outputs))


def _waits(service: Floats, load: float, servers: float, work: Workload, slo: Slo) -> Floats:
    """Probability that a prompt waits no longer than its limit leaves after its own time."""
    if load >= 1:
        return np.zeros_like(service)
    if slo.ttft_s is None:
        return np.ones_like(service)
    mean_s = float(np.mean(service))
    many = max(1, round(servers))
    mean = wait_s(load, mean_s, work.cv2, float(np.var(service)) / mean_s**2, many)
    busy = math.pow(load, math.sqrt(2 * (many + 1)) - 1)
    left = slo.ttft_s - service
    within = 1 - busy * np.exp(-busy * np.maximum(left, 0) / mean) if mean > 0 else np.ones_like(service)
    return np.where(left >= 0, within, 0.0)


def _within_tbt(mean_s: float, spread_s: float, on_top_s: Floats, work: Workload, slo: Slo) -> Floats:
    """Of each request: its slowest tenth of gaps, to whose sum `on_top_s` is added."""
    gaps = np.maximum(work.outputs - 1, 0)
    if slo.tbt_s is None:
        return np.ones_like(gaps)
    slowest = np.maximum(np.ceil(gaps / 10), 1)
    margin = slo.tbt_s - mean_s - spread_s - on_top_s / slowest
    return np.where(gaps > 0, _normal(margin / max(0.7 * spread_s, 0.01 * mean_s)), 1.0)


def _normal(deviations: Floats) -> Floats:
    """Cumulative normal distribution, to 3 digits: Pólya's approximation."""
    half = np.sqrt(1 - np.exp(-2 * deviations**2 / math.pi)) / 2
    return np.asarray(0.5 + np.sign(deviations) * half)
