"""Mean time to first token of one prefill instance under Poisson arrivals, in closed form. Deciding code.

DistServe (Zhong et al., OSDI 2024, section 3.1) for prompts of one length that are served one at a time: `service_s` is the
time of one prompt on one GPU, D in the paper, and `rate_rps` the arrivals R. Two GPUs may share the prompt by layers
(inter-operator, a pipeline of two stages) or by tensors (intra-operator, with a speed-up K between 1 and 2). And what holds
for prompts of many lengths: Pollaczek's mean, and Kingman's tail for bursty arrivals.

The first three raise ConfigError for a rate that cannot be served: the queue would grow for ever.
"""

from __future__ import annotations

import math

from core.errors import ConfigError


def single_ttft_s(rate_rps: float, service_s: float) -> float:
    """M/D/1: D + R D² / (2 (1 − R D))."""
    _check(rate_rps, service_s)
    return service_s + rate_rps * service_s**2 / (2 * (1 - rate_rps * service_s))


def pipeline_ttft_s(rate_rps: float, service_s: float) -> float:
    """Two stages of D/2 each: D + R D² / (4 (2 − R D)). The queue feeds a stage of half the time, the latency stays D."""
    _check(rate_rps, service_s / 2)
    return service_s + rate_rps * service_s**2 / (4 * (2 - rate_rps * service_s))


def tensor_ttft_s(rate_rps: float, service_s: float, speedup: float) -> float:
    """Two GPUs on every tensor, `speedup` K times as fast: D/K + R D² / (2 K (K − R D))."""
    if not 1 <= speedup <= 2:
        raise ConfigError(f"two GPUs are between 1 and 2 times as fast as one, got {speedup:g}")
    _check(rate_rps, service_s / speedup)
    return service_s / speedup + rate_rps * service_s**2 / (2 * speedup * (speedup - rate_rps * service_s))


def crossing_rps(service_s: float, speedup: float) -> float:
    """The rate below which tensors beat the pipeline and above which the pipeline wins; infinite for a speed-up of 2.

    Found by bisection over the rates that both can serve: their difference changes its sign once.
    """
    low, high = 0.0, speedup / service_s * (1 - 1e-12)
    if tensor_ttft_s(high, service_s, speedup) <= pipeline_ttft_s(high, service_s):
        return math.inf
    for _ in range(100):
        middle = (low + high) / 2
        if tensor_ttft_s(middle, service_s, speedup) <= pipeline_ttft_s(middle, service_s):
            low = middle
        else:
            high = middle
    return low


def wait_s(load: float, service_s: float, arrival_cv2: float, service_cv2: float, servers: int = 1) -> float:
    """Mean wait of a queue with several servers behind it (Allen and Cunneen's form of Kingman's bound); infinite from load 1.

    `load`: busy share of each server; `…_cv2`: squared coefficients of variation of gaps between arrivals and of service times.
    With one server, Poisson arrivals (1) and one length (0) this is M/D/1; with Poisson arrivals, Pollaczek's formula.
    """
    if load >= 1:
        return math.inf
    if load <= 0:
        return 0.0
    queued = math.pow(load, math.sqrt(2 * (servers + 1)) - 1)  # Sakasegawa: the probability that all are busy, nearly
    return queued / (servers * (1 - load)) * service_s * (arrival_cv2 + service_cv2) / 2


def wait_within(limit_s: float, mean_wait_s: float, busy: float) -> float:
    """Probability of waiting at most `limit_s`: not at all with probability 1 − `busy`, else exponential (Kingman's tail)."""
    if limit_s < 0:
        return 0.0
    if mean_wait_s <= 0:
        return 1.0
    if math.isinf(mean_wait_s):
        return 0.0
    return 1.0 - busy * math.exp(-busy * limit_s / mean_wait_s)


def _check(rate_rps: float, busy_s: float) -> None:
    if rate_rps < 0 or busy_s <= 0:
        raise ConfigError(f"a rate of 0 or more and a time above 0 are needed, got {rate_rps:g} and {busy_s:g}")
    if rate_rps * busy_s >= 1:
        raise ConfigError(
            f"{rate_rps:g} requests per second at {busy_s:g} s each keep it busier than always: "
            f"it can serve fewer than {1 / busy_s:g} per second"
        )
