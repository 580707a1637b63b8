"""Placements by DistServe's search (Zhong et al., OSDI 2024, algorithms 1 and 2). Deciding code.

Algorithm 1, high node affinity: the network between nodes is fast enough that a prefill and a decode replica may stand
anywhere, so each phase gets the layout with the most goodput per GPU for itself, and replicas in proportion to the rate.
Algorithm 2, low node affinity: KV moves between equal stages inside a node, so prefill and decode are cut into the same
number of segments across nodes and a pair of segments must fit a node; pairs are judged together.

The goodput of a layout is the highest rate at which its play attains the limits, found by halving an interval of rates per
GPU, as in their released code. Layouts are tried in the order of an upper bound, so that most pairs are never played.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cluster.planner_model import Arriving, Layout, PerformanceModel, Shape
from cluster.planner_play import Decode, Timing, play_colocated, play_decode, play_prefill, play_split
from core.errors import ConfigError
from core.latency import percentile
from core.request import Slo

Draw = Callable[[float], Sequence[Arriving]]
"""Requests at a rate: the same lengths at every rate, other gaps."""
BOUND_SLACK = 1.15
"""A pair may do better than the bound of its phases, whose decode is judged under Poisson arrivals; not by more than this."""


@dataclass(frozen=True, slots=True)
class Target:
    """`slo.tpot_s` limits the mean gap. `jointly`: a share of requests must meet both limits; otherwise that share must
    meet each, which is how the released search judges and the weaker demand."""

    slo: Slo
    share: float = 0.9
    jointly: bool = True

    def attained(self, timings: Sequence[Timing]) -> float:
        """Share of requests that met both limits."""
        return sum(self._ttft(t.ttft_s) and self._tpot(t.tpot_s) for t in timings) / len(timings)

    def met(self, timings: Sequence[Timing]) -> bool:
        if self.jointly:
            return self.attained(timings) >= self.share
        ttft = percentile(sorted(t.ttft_s for t in timings), 100 * self.share)
        tpot = percentile(sorted(t.tpot_s for t in timings), 100 * self.share)
        return self._ttft(ttft) and self._tpot(tpot)

    def _ttft(self, seconds: float) -> bool:
        return self.slo.ttft_s is None or seconds <= self.slo.ttft_s

    def _tpot(self, seconds: float) -> bool:
        return self.slo.tpot_s is None or seconds <= self.slo.tpot_s


@dataclass(frozen=True, slots=True)
class Machines:
    nodes: int
    gpus_per_node: int

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True, slots=True)
class Search:
    """Halves [0, per_gpu_max_rps] until it is no wider than `step_rps`, per GPU."""

    per_gpu_max_rps: float = 5.0
    step_rps: float = 0.05
    decode: Decode = Decode.RELEASED

    def goodput_rps(self, gpus: int, met_at: Callable[[float], bool], above_rps: float = 0.0) -> float:
        """Of a layout over `gpus`, in requests per second in all; 0 where not even `above_rps` per GPU, or the lowest, is
        met."""
        low, high = 0.0, self.per_gpu_max_rps
        if above_rps > 0:
            if above_rps >= high or not met_at(above_rps * gpus):
                return 0.0
            low = above_rps
        while high - low > self.step_rps:
            middle = (low + high) / 2
            low, high = (middle, high) if met_at(middle * gpus) else (low, middle)
        return low * gpus


class Placement(NamedTuple):
    """`per_gpu_rps`: goodput of one prefill and decode unit over its GPUs; of algorithm 1, of the pools as sized for the
    rate."""

    prefill: Layout
    decode: Layout
    prefill_replicas: int
    decode_replicas: int
    per_gpu_rps: float

    @property
    def gpus(self) -> int:
        return self.prefill.gpus * self.prefill_replicas + self.decode.gpus * self.decode_replicas


def layouts(shape: Shape, model: PerformanceModel, gpus_max: int) -> list[Layout]:
    """That the model can be cut into and whose memory holds it."""
    return [layout for layout in _cuts(shape, gpus_max) if model.kv_tokens(layout) > 0]


def place_anywhere(
    shape: Shape, machines: Machines, model: PerformanceModel, draw: Draw, target: Target, rate_rps: float, search: Search
) -> Placement:
    """Algorithm 1. Raises ConfigError when no layout meets the limits."""
    fitting = _fitting(layouts(shape, model, machines.gpus), machines)
    prefill, prefill_rps = _best(fitting, lambda layout: prefill_goodput_rps(layout, model, draw, target, search), "TTFT")
    decode, decode_rps = _best(fitting, lambda layout: decode_goodput_rps(layout, model, draw, target, search), "TPOT")
    replicas = math.ceil(rate_rps / prefill_rps), math.ceil(rate_rps / decode_rps)
    gpus = prefill.gpus * replicas[0] + decode.gpus * replicas[1]
    return Placement(prefill, decode, *replicas, min(prefill_rps * replicas[0], decode_rps * replicas[1]) / gpus)


def place_within_nodes(
    shape: Shape, machines: Machines, model: PerformanceModel, draw: Draw, target: Target, rate_rps: float, search: Search
) -> Placement:
    """Algorithm 2. Raises ConfigError when no pair meets the limits."""
    pairs = list(segment_pairs(shape, machines, model))
    phases = {layout for pair in pairs for layout in pair}
    prefill = {layout: prefill_goodput_rps(layout, model, draw, target, search) for layout in phases}
    decode = {layout: decode_goodput_rps(layout, model, draw, target, search) for layout in phases}

    def bound(pair: tuple[Layout, Layout]) -> float:
        return BOUND_SLACK * min(prefill[pair[0]], decode[pair[1]]) / (pair[0].gpus + pair[1].gpus)

    best: tuple[float, tuple[Layout, Layout]] | None = None
    for pair in sorted(pairs, key=lambda pair: (-bound(pair), pair[0].gpus + pair[1].gpus, pair)):
        per_gpu = best[0] if best is not None else 0.0
        if bound(pair) <= per_gpu:
            break
        found = pair_goodput_rps(*pair, model, draw, target, search, per_gpu) / (pair[0].gpus + pair[1].gpus)
        if found > per_gpu:
            best = (found, pair)
    if best is None:
        raise ConfigError(_unmet("no pair of layouts within a node", target.slo))
    per_gpu, (first, second) = best
    units = math.ceil(rate_rps / (per_gpu * (first.gpus + second.gpus)))
    return Placement(first, second, units, units, per_gpu)


def segment_pairs(shape: Shape, machines: Machines, model: PerformanceModel) -> Iterator[tuple[Layout, Layout]]:
    """Prefill and decode layouts of one unit, each cut across the same number of nodes, a segment of each sharing a node.

    The released enumeration: tp within a node, tp_p · pp_p + tp_d · pp_d within a node, and the whole within the machines.
    """
    seen = set()
    for cross in range(1, machines.nodes + 1):
        if shape.layers % cross:
            continue
        within = _cuts(shape, machines.gpus_per_node)
        for first in within:
            for second in within:
                if first.gpus + second.gpus > machines.gpus_per_node:
                    continue
                pair = Layout(first.tp, cross * first.pp), Layout(second.tp, cross * second.pp)
                if any(shape.layers % one.pp or model.kv_tokens(one) <= 0 for one in pair) or pair in seen:
                    continue
                seen.add(pair)
                yield pair


def prefill_goodput_rps(layout: Layout, model: PerformanceModel, draw: Draw, target: Target, search: Search) -> float:
    def met_at(rate_rps: float) -> bool:
        requests = draw(rate_rps)
        done = play_prefill(requests, model, layout)
        return target.met([Timing(at - request.arrival_s, 0.0) for at, request in zip(done, requests, strict=True)])

    return search.goodput_rps(layout.gpus, met_at)


def decode_goodput_rps(layout: Layout, model: PerformanceModel, draw: Draw, target: Target, search: Search) -> float:
    def met_at(rate_rps: float) -> bool:
        requests = draw(rate_rps)
        ready = [request.arrival_s for request in requests]
        end = play_decode(ready, requests, model, layout, search.decode)
        spans = zip(end, requests, strict=True)
        return target.met([Timing(0.0, (at - request.arrival_s) / request.output_tokens) for at, request in spans])

    return search.goodput_rps(layout.gpus, met_at)


def pair_goodput_rps(
    prefill: Layout, decode: Layout, model: PerformanceModel, draw: Draw, target: Target, search: Search, above_rps: float = 0.0
) -> float:
    """Of one prefill and one decode replica together; 0 where they do not do better than `above_rps` per GPU."""
    return search.goodput_rps(
        prefill.gpus + decode.gpus,
        lambda rate: target.met(play_split(draw(rate), model, prefill, decode, search.decode)),
        above_rps,
    )


def colocated_goodput_rps(layout: Layout, model: PerformanceModel, draw: Draw, target: Target, search: Search) -> float:
    return search.goodput_rps(layout.gpus, lambda rate: target.met(play_colocated(draw(rate), model, layout)))


def _cuts(shape: Shape, gpus_max: int) -> list[Layout]:
    tps = [tp for tp in range(1, gpus_max + 1) if shape.heads % tp == 0]
    pps = [pp for pp in range(1, gpus_max + 1) if shape.layers % pp == 0]
    return [Layout(tp, pp) for tp in tps for pp in pps if tp * pp <= gpus_max]


def _fitting(found: Sequence[Layout], machines: Machines) -> list[Layout]:
    return [layout for layout in found if layout.tp <= machines.gpus_per_node]


def _best(found: Sequence[Layout], goodput_rps: Callable[[Layout], float], limit: str) -> tuple[Layout, float]:
    """Most goodput per GPU, then the fewest GPUs."""
    rated = [(goodput_rps(layout), layout) for layout in found]
    if not rated or max(rated)[0] <= 0:
        raise ConfigError(
            f"no layout of {len(rated)} that fit meets the {limit} limit at any rate; allow more time or give larger GPUs"
        )
    rps, layout = max(rated, key=lambda one: (one[0] / one[1].gpus, -one[1].gpus))
    return layout, rps


def _unmet(what: str, slo: Slo) -> str:
    return f"{what} meets TTFT {slo.ttft_s} s and TPOT {slo.tpot_s} s at any rate; allow more time or give larger GPUs"
