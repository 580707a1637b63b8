"""SpotServe's parallelization controller: which pipelines to run on the spot instances there are. Deciding code.

Miao et al., ASPLOS 2024, algorithm 1. A configuration (D, P, M, B) is D pipelines of P stages, each split over
M GPUs, with batches of B. Where some configuration keeps up with the arrivals, the quickest answer is taken, of similarly quick
ones the one on fewest instances; else the one that serves most. Latency is their estimate from a profile of one layer
(FasterTransformer, batches that run from prompt to last token together).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from core.errors import ConfigError

SIMILAR = 0.10
"""So much longer a latency is still similar. The paper names no figure; any from 0.07 to 0.11 gives the choices it reports."""
_MS = 1e-3


@dataclass(frozen=True, slots=True)
class LayerProfile:
    """Milliseconds of one layer by (M, micro-batch): `init` for the whole prompt, `incr` per generated token; `embed` by
    batch 1, 2, 4, 8; `…_comm` a hand-over between stages. `factor` is the profile's own correction."""

    layers: int
    padded_layers: int
    tensor_max: int
    init: Mapping[tuple[int, int], float]
    incr: Mapping[tuple[int, int], float]
    embed: tuple[float, ...]
    init_comm: float
    incr_comm: float
    factor: float

    def latency_s(self, pipeline: Pipeline, output_tokens: int) -> float:
        """From prompt to last token of a batch, for the quickest of the micro-batchings that divide it."""
        sizes = _powers(pipeline.batch)
        stage_layers = math.ceil(self.layers / pipeline.stages)
        gaps = pipeline.stages - 1
        prompt = min(
            (self.init[pipeline.tensor, pipeline.batch // n] * stage_layers * (gaps + n) + self.init_comm * gaps) / n
            for n in sizes
        )
        token = min(
            self.incr[pipeline.tensor, pipeline.batch // n] * stage_layers * (gaps + n) + self.incr_comm / n * gaps
            for n in sizes
        )
        embedding = 2 * self.embed[pipeline.batch.bit_length() - 1]
        return (prompt + token * output_tokens + embedding) * self.factor * _MS


@dataclass(frozen=True, slots=True)
class Pipeline:
    """P stages of M GPUs each, batches of B."""

    stages: int
    tensor: int
    batch: int

    @property
    def gpus(self) -> int:
        return self.stages * self.tensor


@dataclass(frozen=True, slots=True)
class Configuration:
    """`rate_rps`: what all pipelines serve together (φ); `latency_s`: of one batch."""

    pipelines: int
    pipeline: Pipeline
    latency_s: float
    rate_rps: float

    @property
    def shape(self) -> tuple[int, int, int]:
        """(D, P, M)"""
        return (self.pipelines, self.pipeline.stages, self.pipeline.tensor)

    def instances(self, gpus_each: int) -> int:
        return math.ceil(self.pipelines * self.pipeline.gpus / gpus_each)


@dataclass(frozen=True, slots=True)
class Fleet:
    """`instances`: counting those on their way, without those being taken. `obtainable`: how many more the cloud would give."""

    instances: int
    obtainable: int = 0
    gpus_each: int = 4
    gpus_min: int = 1
    """Of a pipeline: as many as the model needs to fit."""
    batch_max: int = 4
    output_tokens: int = 128


@dataclass(frozen=True, slots=True)
class Decision:
    """`change`: instances to acquire, or below zero to release, on-demand ones first."""

    configuration: Configuration
    change: int


def decide(profile: LayerProfile, fleet: Fleet, arrivals_rps: float) -> Decision | None:
    """None where no pipeline fits on what there is and could be had."""
    known = list(_configurations(profile, fleet))
    keeping_up = [one for one in known if one.rate_rps >= arrivals_rps]
    if keeping_up:
        quickest = min(one.latency_s for one in keeping_up)
        similar = [one for one in keeping_up if one.latency_s <= (1 + SIMILAR) * quickest]
        chosen = min(similar, key=lambda one: (one.instances(fleet.gpus_each), one.latency_s))
    else:
        here = [one for one in known if one.instances(fleet.gpus_each) <= fleet.instances]
        if not here:
            return None
        chosen = max(here, key=lambda one: (one.rate_rps, -one.latency_s))
    return Decision(chosen, chosen.instances(fleet.gpus_each) - fleet.instances)


def reroute(profile: LayerProfile, running: Configuration, fleet: Fleet) -> Configuration | None:
    """What is left by whoever cannot change its pipelines and drops those that lost a GPU (the baseline); None when all did."""
    pipelines = min(running.pipelines, fleet.instances * fleet.gpus_each // running.pipeline.gpus)
    return _configured(profile, fleet, pipelines, running.pipeline) if pipelines else None


def _configurations(profile: LayerProfile, fleet: Fleet) -> Iterator[Configuration]:
    gpus = (fleet.instances + fleet.obtainable) * fleet.gpus_each
    for tensor in _powers(profile.tensor_max):
        for stages in range(1, gpus // tensor + 1):
            if profile.padded_layers % stages or stages * tensor < fleet.gpus_min:
                continue
            for batch in _powers(fleet.batch_max):
                for pipelines in range(1, gpus // (stages * tensor) + 1):
                    yield _configured(profile, fleet, pipelines, Pipeline(stages, tensor, batch))


def _configured(profile: LayerProfile, fleet: Fleet, pipelines: int, pipeline: Pipeline) -> Configuration:
    latency_s = profile.latency_s(pipeline, fleet.output_tokens)
    return Configuration(pipelines, pipeline, latency_s, pipelines * pipeline.batch / latency_s)


def _powers(most: int) -> list[int]:
    return [2**n for n in range(most.bit_length())]


def layer_profile(tree: Mapping[str, Any], where: str) -> LayerProfile:
    """From the parsed JSON of a profile of SpotServe's. Raises ConfigError that names `where` for what is not of its shape."""
    try:
        tensors = [n for n in _powers(int(tree["max_tp"])) if f"tp-{n}" in tree]
        times = {(n, b): tree[f"tp-{n}"][f"bsz-{b}"] for n in tensors for b in (1, 2, 4, 8)}
        return LayerProfile(
            layers=int(tree["layer_num"]),
            padded_layers=int(tree["padded_layer_num"]),
            tensor_max=max(tensors),
            init=MappingProxyType({key: float(time["init"]) for key, time in times.items()}),
            incr=MappingProxyType({key: float(time["incr"]) for key, time in times.items()}),
            embed=tuple(float(value) for value in tree["embed"]),
            init_comm=float(tree["pp_init_comm"]),
            incr_comm=float(tree["pp_incr_comm"]),
            factor=float(tree["final_fix_factor"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{where} is no profile of SpotServe's: {type(error).__name__} {error}") from None
