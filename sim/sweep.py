"""Random clusters, workloads and faults, by seed: what breaks a rule is made as small as possible and can be replayed."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from typing import Any

from core.config import Config
from core.cost_model import CostModel, StepCost
from router.policies import POLICIES
from sim.faults import Fault, drawn_faults
from sim.run import simulate
from sim.workload import Arrival

SPAN_S = 20.0
BLOCK_TOKENS = 32
COST = StepCost(base_s=0.004, prefill_token_s=2e-4, prefill_pair_s=1e-7, decode_row_s=4e-4, decode_context_s=2e-6)
MODEL = CostModel(COST, kv_token_bytes=1024)
SHRINKS_MAX = 200


@dataclass(frozen=True, slots=True)
class Story:
    """Everything that a run depends on."""

    seed: int
    tree: dict[str, Any]
    policy: str
    arrivals: tuple[Arrival, ...]
    faults: tuple[Fault, ...]

    def play(self) -> None:
        """Raises whatever goes wrong."""
        simulate(
            Config.model_validate(self.tree),
            self.arrivals,
            self.policy,
            self.seed,
            faults=self.faults,
            checks=True,
            model=MODEL,
        )


def story_of(seed: int) -> Story:
    """The story of a seed: the same one whenever and wherever it is told."""
    draw = random.Random(f"story {seed}")
    pools = [{"role": "colocated", "count": draw.randint(1, 3)}] if draw.random() < 0.3 else []
    if not pools or draw.random() < 0.3:
        pools += [{"role": role, "count": draw.randint(1, 3)} for role in ("prefill", "decode")]
    workers = [f"{pool['role']}-{n}" for pool in pools for n in range(int(str(pool["count"])))]
    directory, number_of_stores = draw.random() < 0.5, draw.choice((0, 1, 2))
    tree = {
        "store": {
            "nodes": number_of_stores,
            "dram_bytes": 2**20,
            "directory_ttl_s": draw.choice((2.0, 20.0)),
            "fetch_always": draw.random() < 0.5,
        },
        "engine": {
            "block_size": draw.choice((4, 16)),
            "kv_bytes": draw.choice((1, 1, 4)) * 2**19,
            "max_running": draw.choice((2, 8, 32)),
            "max_step_tokens": draw.choice((32, 256)),
            "max_waiting": draw.choice((2, 64)),
            "prefix_cache": draw.random() < 0.8,
        },
        "transfer": {"lease_s": draw.choice((2.0, 10.0)), "lease_margin_s": 0.5},
        "router": {
            "queue": draw.choice(("slack", "fcfs", "mlfq")),
            "admission": draw.choice(("off", "reject")),
            "max_queue": draw.choice((4, 256)),
            "queue_timeout_s": draw.choice((5.0, 60.0)),
            "max_attempts": draw.choice((2, 8)),
        },
        "sim": {
            "pools": pools,
            "engine": draw.choice(("exact", "counted")),
            "directory": directory,
            "routers": draw.choice((1, 1, 2)),
            "start_s": draw.choice((0.5, 5.0)),
            "report_delay_s": draw.choice((0.0, 0.0, 2.0)),
            "links": {"bandwidth": draw.choice((10**5, 10**7, 10**9)), "latency": draw.choice((0.0002, 0.02))},
            "slo": {"ttft_s": 1.0, "tbt_s": 0.05},
        },
    }
    arrivals = tuple(sorted((_arrival(draw) for _ in range(draw.randint(5, 40))), key=lambda each: each.arrival_s))
    stores = [f"store-{number}" for number in range(number_of_stores if directory else 0)]
    faults = tuple(drawn_faults(draw, [*workers, *stores], SPAN_S, 6, directory))
    return Story(seed, tree, draw.choice(sorted(POLICIES)), arrivals, faults)


def _arrival(draw: random.Random) -> Arrival:
    asked, family = int(draw.paretovariate(1.1) * 12), draw.randint(0, 3)
    asked = min(asked, 220)
    names = (family, *(draw.randint(0, 1) for _ in range(-(-asked // BLOCK_TOKENS) - 1)))
    at = draw.choice((draw.uniform(0, SPAN_S), float(draw.randint(0, 3))))
    slo_class = draw.choice(("", "", "interactive", "batch"))
    return Arrival(at, asked, draw.randint(1, 60), names, BLOCK_TOKENS, tenant=draw.choice("ab"), slo_class=slo_class)


@dataclass(frozen=True, slots=True)
class Finding:
    """`error`: of the story as it was told; `small` breaks a rule too, with as little as could be found."""

    seed: int
    error: str
    small: Story
    small_error: str

    def __str__(self) -> str:
        lines = [f"seed {self.seed}: {self.error}", f"  replay: make sim SEED={self.seed} COUNT=1"]
        lines.append(
            f"  still wrong with {len(self.small.arrivals)} requests and {len(self.small.faults)} faults: {self.small_error}"
        )
        lines += [f"    {each}" for each in (*self.small.arrivals, *self.small.faults)]
        return "\n".join(lines)


def failure_of(story: Story) -> str:
    """What goes wrong in it; empty when nothing does."""
    try:
        story.play()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def examine(seed: int) -> Finding | None:
    story = story_of(seed)
    error = failure_of(story)
    if not error:
        return None
    small, small_error = shrink(story, error)
    return Finding(seed, error, small, small_error)


def shrink(story: Story, error: str, failure: Callable[[Story], str] = failure_of) -> tuple[Story, str]:
    """Leaves out halves, quarters … of the faults and of the requests as long as something stays wrong (delta debugging:
    Zeller and Hildebrandt, TSE 2002, without its complements)."""
    tried = 0
    for field in ("faults", "arrivals"):
        size = max(1, len(getattr(story, field)) // 2)
        while size:
            start, parts = 0, getattr(story, field)
            while start < len(parts) and tried < SHRINKS_MAX:
                tried += 1
                smaller = replace(story, **{field: parts[:start] + parts[start + size :]})
                found = failure(smaller)
                if found:
                    story, error, parts = smaller, found, getattr(smaller, field)
                else:
                    start += size
            size //= 2
    return story, error


def sweep(first: int, count: int, jobs: int | None = None) -> Iterator[Finding | None]:
    """Examines so many seeds on all cores; yields a finding or None for each, as they are done."""
    with ProcessPoolExecutor(jobs or os.cpu_count()) as pool:
        for done in as_completed([pool.submit(examine, seed) for seed in range(first, first + count)]):
            yield done.result()
