"""How long a placement takes: the decision alone, by policy and size of the cluster, and what the index of blocks costs.

Claims: with 1,000 workers and a million indexed blocks a prompt of 32,768 tokens is placed in 0.5 ms (median) and 2 ms
(99th percentile) of one core, its block keys given; making the keys takes 1 µs per block. Growth from 10 to 10,000 workers is
plotted.

Half of the workers prefill, half decode. The index holds conversations of 2,048 blocks behind 16 system prompts of 64, which
every worker has; each turn of a conversation is held by three workers, and the next turn by three others. A prompt begins like
one of them and ends with something new, at a random place. Times are of the thread (CPU), so that neighbours count little; they
still share the cache. Keys are new objects each time, as they come from hashing a prompt. The router has two requests of its
own under way per worker, half of them on prompts. Requests are new ones that a policy may keep waiting (`Need.may_wait`); some
45 in 100 of these prompts can be within their limits, the others are told to wait, which is timed too.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from benchmarks.rows import Row, arguments, report
from core.blocks import KEY_BYTES, BlockKey, KvLayout, block_keys, root_key
from core.cost_model import StepCost
from core.kv_changes import KEYS_MAX, KvChanges
from core.report import WorkerState
from core.request import Slo, WorkerRole
from router.block_index import BlockIndex
from router.key_runs import PromptKeys
from router.policies import make_policy
from router.policy import Need, Pair
from router.situation import Situation
from router.view import NO_CLAIM, Claim, Claims, ClusterView, WorkerView

BLOCK_TOKENS, BLOCKS = 16, 2048
SYSTEM_BLOCKS, SYSTEM_PROMPTS, HOLDERS = 64, 16, 3
POLICIES = ("goodput", "least_load", "prefix_aware", "kv_cost", "conductor")
ROLES = (WorkerRole.PREFILL, WorkerRole.DECODE)
SIZES = (10, 100, 1000, 10_000)
LAYOUT = KvLayout(b"\x01" * 16, "float32", 32, 8, 128, BLOCK_TOKENS)
PLOT = Path(__file__).parent / "results" / "decision.png"


class Timed(NamedTuple):
    p50_ms: float
    p99_ms: float


def workers(count: int, rng: random.Random) -> list[WorkerView]:
    return [
        WorkerView(
            f"w{number:05d}",
            ROLES[number % 2],
            1,
            WorkerState.READY,
            "127.0.0.1:1",
            running=rng.randrange(20),
            waiting_tokens=rng.randrange(4000),
            context_tokens=rng.randrange(100_000),
            blocks_total=10_000,
            blocks_free=rng.randrange(5000, 10_000),
            layout=LAYOUT,
            step_cost=StepCost(2e-3, rng.uniform(0.8, 1.2) * 1e-4, 1e-8, 2e-4, 1e-7),
        )
        for number in range(count)
    ]


def random_keys(count: int, rng: random.Random) -> list[BlockKey]:
    blob = rng.randbytes(count * KEY_BYTES)
    return [blob[at : at + KEY_BYTES] for at in range(0, len(blob), KEY_BYTES)]


class Town:
    """A cluster with its index filled as workers would fill it."""

    def __init__(self, count: int, blocks: int, rng: random.Random) -> None:
        self.rng = rng
        self.workers = workers(count, rng)
        self.index = BlockIndex(2 * blocks)
        self.told: list[float] = []  # seconds per key of each portion
        systems = [random_keys(SYSTEM_BLOCKS, rng) for _ in range(SYSTEM_PROMPTS)]
        for worker in self.workers:
            self._tell(worker, [key for system in systems for key in system])
        self.conversations = []
        while len(self.index) < blocks:
            self.conversations.append([*rng.choice(systems), *random_keys(BLOCKS - SYSTEM_BLOCKS, rng)])
            self._converse(self.conversations[-1])
        view = ClusterView(1, MappingProxyType({worker.worker_id: worker for worker in self.workers}))
        self.situation = Situation(view, frozenset(view.workers), self._claims(), self.index, 3.0)

    def _claims(self) -> Claims:
        """Of requests under way."""
        claims, sides = Claims(), [[w.worker_id for w in self.workers if w.role is role] for role in ROLES]
        for number in range(2 * len(self.workers)):
            prefill, decode = map(self.rng.choice, sides)
            claim = Claim(prefill, 500, decode, 500) if number % 2 else Claim(None, 0, decode, 900)
            claims.swap(NO_CLAIM, claim)
        return claims

    def _converse(self, keys: list[BlockKey]) -> None:
        start = SYSTEM_BLOCKS
        while start < len(keys):
            end = start + self.rng.randrange(100, 600)
            for worker in self.rng.sample(self.workers, HOLDERS):
                self._tell(worker, keys[SYSTEM_BLOCKS:end])
            start = end

    def _tell(self, worker: WorkerView, keys: Sequence[BlockKey]) -> None:
        for start in range(0, len(keys), KEYS_MAX):
            part = keys[start : start + KEYS_MAX]
            changes = KvChanges(0, 2, b"".join(part))
            began = time.thread_time()
            self.index.heard(worker.worker_id, changes)
            self.told.append((time.thread_time() - began) / len(part))

    def prompt(self) -> tuple[BlockKey, ...]:
        known = self.rng.choice(self.conversations)[: self.rng.randrange(BLOCKS)]
        return PromptKeys(bytes(bytearray(key)) for key in (*known, *random_keys(BLOCKS - len(known), self.rng)))


def decided(town: Town, name: str, rounds: int) -> Timed:
    policy, taken, placed = make_policy(name), [], 0
    for number in range(rounds + 50):
        keys = town.prompt() if policy.wants_keys else ()
        slo = Slo(ttft_s=5.0, tbt_s=0.05)
        need = Need(BLOCKS * BLOCK_TOKENS, keys=keys, draw=number, slo=slo, output_tokens=200, may_wait=True)
        began = time.thread_time()
        decision = policy.decide(town.situation, need)
        taken.append(time.thread_time() - began)
        placed += isinstance(decision.place, Pair)
    assert placed > rounds // 4, "not all of them wait"
    return percentiles(taken[50:])


def percentiles(taken: list[float]) -> Timed:
    taken = sorted(taken)
    return Timed(taken[len(taken) // 2] * 1e3, taken[len(taken) * 99 // 100] * 1e3)


def keys_made(rounds: int) -> float:
    """Microseconds per block, median."""
    rng, taken = random.Random(3), []
    for _ in range(rounds):
        tokens = [rng.randrange(128_000) for _ in range(BLOCKS * BLOCK_TOKENS)]
        began = time.thread_time()
        PromptKeys(block_keys(root_key(LAYOUT.fingerprint), tokens, BLOCK_TOKENS))
        taken.append((time.thread_time() - began) / BLOCKS)
    return sorted(taken)[rounds // 2] * 1e6


def measured(options: argparse.Namespace) -> Iterator[Row]:
    rounds, blocks = (300, 250_000) if options.quick else (500, 1_000_000)
    sizes = [size for size in SIZES if size <= 1000] if options.quick else list(SIZES)
    curves: dict[str, dict[int, Timed]] = {name: {} for name in POLICIES}
    for size in sizes:
        sys.stderr.write(f"{size} workers\n")
        town = Town(size, blocks, random.Random(size))
        for name in POLICIES:
            curves[name][size] = decided(town, name, 4 * rounds if size == 1000 else rounds)
        if size == 1000:
            yield from about(town, blocks, curves)
    yield Row("decision_keys_us", "making block keys, per block", keys_made(20), "us", 1.0, "<=", how="SHA-256 chain")
    for name in POLICIES:
        for size in sizes:
            yield Row(f"decision_{name}_{size}", f"{name}, {size:,} workers, median", curves[name][size].p50_ms, "ms")
    if not options.quick:
        plot(curves)


def about(town: Town, blocks: int, curves: dict[str, dict[int, Timed]]) -> Iterator[Row]:
    how = f"1,000 workers, {blocks:,} blocks, 2,048-block prompt, CPU time"
    for name in POLICIES:
        timed = curves[name][1000]
        yield Row(f"decision_{name}_p50_ms", f"decision of {name}, median", timed.p50_ms, "ms", 0.5, "<=", how=how)
        yield Row(f"decision_{name}_p99_ms", f"decision of {name}, p99", timed.p99_ms, "ms", 2.0, "<=", how=how)
    per_million = town.index.nbytes / len(town.index)
    yield Row("decision_index_mb", "memory of the index per million blocks", per_million, "MB", how=how)
    told = sorted(town.told)[len(town.told) // 2] * 1e6
    yield Row("decision_told_us", "taking a portion of a node's changes, per key", told, "us", how=how)


def plot(curves: dict[str, dict[int, Timed]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    axes_: Any = axes
    for name, curve in curves.items():
        line = axes_.plot(list(curve), [timed.p50_ms for timed in curve.values()], marker="o", label=name)
        axes_.plot(list(curve), [timed.p99_ms for timed in curve.values()], ls=":", marker=".", color=line[0].get_color())
    axes_.axhline(0.5, color="grey", lw=0.8)
    axes_.axhline(2.0, color="grey", lw=0.8, ls=":")
    axes_.set(xscale="log", yscale="log", xlabel="workers", ylabel="CPU time of a decision, ms")
    axes_.set_title("A 32k-token prompt over a million indexed blocks: median (solid), p99 (dotted)", fontsize=10)
    axes_.grid(alpha=0.3, which="both")
    axes_.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(PLOT, dpi=130)


def main() -> None:
    options = arguments(__doc__).parse_args()
    report(measured(options), options.json)


if __name__ == "__main__":
    main()
