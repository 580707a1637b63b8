"""The engine and the workloads on which simulated clusters are compared: machines of a public profile, excerpts of traces."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

from benchmarks.azure_lengths import INPUT_TOKENS, OUTPUT_TOKENS, PERCENTS
from core.config import Config
from core.errors import ConfigError
from sim.traces import read_trace
from sim.workload import Arrival, at_times
from sim.workload_lengths import Apart, Quantiles
from sim.workload_shapes import Arrivals, arrivals, spread_ticks

COPIED = Path(__file__).resolve().parent.parent / "tests/data"
MODEL = "nvidia/Llama-3.3-70B-Instruct-FP8"
GPUS = 4
"""Of one machine."""
ENGINE = f"{MODEL.partition('/')[2]} on {GPUS} H100, steps as measured by NVIDIA Dynamo (vLLM 0.10.1.1)"
KV_BYTES = 200 * 10**9
"""Four GPUs of 80 GB less 70 GB of weights, nine tenths of the rest."""
LINK_BYTES_PER_S = 100 * 10**9
"""Half of a DGX-H100's, which has eight GPUs and, after Splitwise, 200 GB/s."""
BLOCK_TOKENS = 64
RUNNING_MAX = 512


@dataclass(frozen=True, slots=True)
class Workload:
    """`file`: below traces/ of the data folder. `requests`, `quick_requests`: how many are taken, after the first `skip`."""

    name: str
    title: str
    file: str
    requests: int = 2000
    quick_requests: int = 400
    ticks: bool = False
    skip: int = 0


WORKLOADS = (
    Workload("azure_conv", "Azure conversation", "azure2023_conv.csv"),
    Workload("azure_code", "Azure code", "azure2023_code.csv", quick_requests=700),
    Workload("mooncake_conv", "Mooncake conversation", "mooncake_conversation.jsonl.gz", quick_requests=300, ticks=True),
    Workload("mooncake_synthetic", "Mooncake synthetic", "mooncake_synthetic.jsonl", quick_requests=400),
    Workload("servegen", "ServeGen m-large", "servegen/m-large_sampled_20min.csv.gz", 8000, 3000),
)
COPIED_WORKLOAD = Workload("copied", "Azure conversation, quantiles of its lengths, Poisson", "", 1000, 400)


@lru_cache(maxsize=2)
def excerpt(workload: Workload, data: Path | None, quick: bool) -> tuple[Arrival, ...]:
    """Some of its requests, the first one at time 0. Raises ConfigError as `read_trace` does, and where there are none."""
    count = workload.quick_requests if quick else workload.requests
    taken = list(islice(_whole(workload, data, workload.skip + count), workload.skip, workload.skip + count))
    if len(taken) < 2:
        raise ConfigError(f"{workload.title} has no two requests after the first {workload.skip}; skip fewer")
    begun = taken[0].arrival_s if workload.skip else 0.0
    return tuple(at_times(taken, (one.arrival_s - begun for one in taken)))


def _whole(workload: Workload, data: Path | None, most: int) -> Iterable[Arrival]:
    if data is not None and workload.file:
        found = read_trace(str(data / "traces" / workload.file))
        return spread_ticks(found, random.Random(1)) if workload.ticks else found
    lengths, draw = Apart(Quantiles(PERCENTS, INPUT_TOKENS), Quantiles(PERCENTS, OUTPUT_TOKENS)), random.Random(1)
    due = arrivals(1.0, Arrivals.POISSON, 1.0, random.Random(2))
    return (Arrival(at, *lengths.draw(draw)) for at in islice(due, most))


def rate_of(requests: Sequence[Arrival]) -> float:
    """Requests per second as recorded."""
    return (len(requests) - 1) / (requests[-1].arrival_s - requests[0].arrival_s)


@dataclass(frozen=True, slots=True)
class Shape:
    """Machines by role; `chunk`: the most tokens that a worker computes in one step, `prefill_chunk`: a prefill worker."""

    prefill: int
    decode: int
    colocated: int
    chunk: int
    prefill_chunk: int = 1024

    @property
    def gpus(self) -> int:
        return GPUS * (self.prefill + self.decode + self.colocated)

    def __str__(self) -> str:
        parts = ((self.prefill, f"prefill (chunks of {self.prefill_chunk})"), (self.decode, "decode"))
        named = [f"{count} {name}" for count, name in parts if count]
        return " + ".join([*named, *([f"{self.colocated} colocated (chunks of {self.chunk})"] if self.colocated else [])])


@dataclass(frozen=True, slots=True)
class Limits:
    ttft_s: float
    tbt_s: float
    tpot_s: float

    def __str__(self) -> str:
        return f"TTFT ≤ {self.ttft_s * 1e3:.0f} ms, TBT ≤ {self.tbt_s * 1e3:.1f} ms, mean TPOT ≤ {self.tpot_s * 1e3:.1f} ms"


def config_of(shape: Shape, limits: Limits | None, data: Path | None) -> Config:
    folder = data / "profiles/dynamo" if data is not None else COPIED / "dynamo"
    pools = [
        {"role": role, "count": count, "tp": GPUS, "max_step_tokens": chunk}
        for role, count, chunk in (
            ("prefill", shape.prefill, shape.prefill_chunk),
            ("decode", shape.decode, shape.chunk),
            ("colocated", shape.colocated, shape.chunk),
        )
        if count
    ]
    profile = {
        "file": str(folder / "prefill_presweep.csv"),
        "select": {"system": "h100_sxm", "model": MODEL, "tp": str(GPUS)},
    }
    slo = {} if limits is None else {"ttft_s": limits.ttft_s, "tbt_s": limits.tbt_s, "tpot_s": limits.tpot_s}
    return Config.model_validate(
        {
            "engine": {"kv_bytes": KV_BYTES, "max_running": RUNNING_MAX, "block_size": BLOCK_TOKENS, "max_waiting": 100_000},
            "router": {"max_queue": 100_000, "queue_timeout_s": 600.0},
            "sim": {"profile": profile, "pools": pools, "links": {"bandwidth": LINK_BYTES_PER_S}, "slo": slo},
        }
    )
