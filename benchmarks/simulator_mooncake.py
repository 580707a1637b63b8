"""Mooncake on the product in the simulator: what its scheduling is worth, and its early rejection.

Claims (issue "The simulator and the planner"; Qin et al., FAST '25 and arXiv:2407.00079): the order of the scheduling ablation,
mean TTFT of random > load balancing > local cache > global cache (published: 19.65, 5.27, 3.58, 3.07 s); the order of requests
lost at twice the rate, baseline > early rejection > with prediction (published: 4,183, 3,771, 3,589 of 23,000). Lost is whoever
is refused, fails or misses a limit, for all three alike.

As there, Llama-3-70B, eight A800 to a node, 3 M tokens of KV beside each prefill instance; step times are the roofline's
(`core/roofline.py`), so only orders and ratios compare. Eight prefill and eight decode instances play the first part of the
conversation trace, whose prompts share prefixes by name, `RATE_SCALE` times as fast as recorded, so that prefill is nearly
full, as the published waits say it was. `random` and `load` are the router's `random` and `least_load`; `local` is its
Conductor while workers fetch nothing from each other (`store.fetch: false`); `global` is the same with fetching. Arrivals of a
tick are spread over it, as the data's notes advise. As in the paper a request goes to its instance when it comes. Our router
holds it until some prefill worker can start it soon (`router.policy.PREFILL_WINDOW_TOKENS`), which takes most of the harm out
of choosing at random; rows say by how much, and what the default policy makes of it.

Early rejection is the router's (`router.admission: reject`), with one decode instance and a limit on token gaps that it cannot
keep for everybody, so that decode is what is short. Baseline: decode is not looked at before the first token; the paper's then
refuses in vain computed prompts, here a decode worker's memory is reserved before the prompt is computed, so it is limits
that are missed. Early rejection: today's load counts. With prediction: as shipped, those that will have ended by then are taken
off; it turns the fewest away, but where the limit is as near as here some of those miss it by a little.

    python -m benchmarks.simulator_mooncake [--quick] [--data DIR] [--json FILE]
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import router.policy as router_policy
from benchmarks.rows import Row, arguments, report
from core.config import Config
from router.early_rejection import Departures
from sim.run import SimResult, simulate
from sim.traces import read_trace
from sim.workload import Arrival
from sim.world import World

TRACE = "traces/mooncake_conversation.jsonl.gz"
TICK_S = 3.0
RATE_SCALE = 1.4
REJECTION_TBT_S = 0.05
KV_TOKENS = 3_000_000
LLAMA3_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
KV_TOKEN_BYTES = 327_680
ABLATION = (  # name, policy, whether workers fetch, published mean TTFT
    ("random", "random", False, 19.65),
    ("load", "least_load", False, 5.27),
    ("local cache", "conductor", False, 3.58),
    ("global cache", "conductor", True, 3.07),
)


class NotLookedAt(Departures):
    """Everybody will have left by then, so nobody is refused for decode: the baseline."""

    def between(self, worker: str, now: float, until: float) -> int:
        return 1_000_000


class AsToday(Departures):
    """Nobody will have left."""

    def between(self, worker: str, now: float, until: float) -> int:
        return 0


REJECTION: tuple[tuple[str, Callable[[], Departures], int], ...] = (
    ("baseline", NotLookedAt, 4183),
    ("early rejection", AsToday, 3771),
    ("with prediction", Departures, 3589),
)


def config(model: Path, prefill: int, decode: int, *, fetch: bool = False, reject: bool = False, tbt_s: float = 0.2) -> Config:
    tree: dict[str, Any] = {
        "engine": {"block_size": 256, "max_step_tokens": 8192, "max_running": 512},
        "router": {"admission": "reject" if reject else "off", "max_queue": 100_000, "queue_timeout_s": 600.0},
        "store": {"fetch": fetch, "fetch_timeout_s": 5.0},
        "sim": {
            "profile": {"roofline": {"model": str(model), "gpu": "a800-80g"}},
            "pools": [
                {"role": "prefill", "count": prefill, "tp": 8, "kv_bytes": KV_TOKENS * KV_TOKEN_BYTES},
                {"role": "decode", "count": decode, "tp": 8},
            ],
            "links": {"bandwidth": 100_000_000_000, "latency": 0.0005},
            "slo": {"ttft_s": 30.0, "tbt_s": tbt_s},
        },
    }
    return Config.model_validate(tree)


def arrivals(data: Path, count: int, scale: float) -> Iterator[Arrival]:
    """The first so many of the trace, each tick's spread evenly over it, `scale` times as fast."""
    waiting: list[Arrival] = []
    for one in islice(read_trace(str(data / TRACE)), count):
        if waiting and one.arrival_s > waiting[0].arrival_s:
            yield from _spread(waiting, scale)
            waiting = []
        waiting.append(one)
    yield from _spread(waiting, scale)


def _spread(tick: list[Arrival], scale: float) -> Iterator[Arrival]:
    for number, one in enumerate(tick):
        yield replace(one, arrival_s=(one.arrival_s + TICK_S * number / len(tick)) / scale)


@contextmanager
def placed_at_once() -> Iterator[None]:
    """Nobody waits at the router for a prefill worker that can start soon."""
    kept = router_policy.PREFILL_WINDOW_TOKENS
    router_policy.PREFILL_WINDOW_TOKENS = sys.maxsize
    try:
        yield
    finally:
        router_policy.PREFILL_WINDOW_TOKENS = kept


def ablation(model: Path, data: Path, count: int) -> list[Row]:
    rows, means = list[Row](), list[float]()

    def played(name: str, policy: str, fetch: bool, said: str, peer: str = "") -> float:
        result = simulate(config(model, 8, 8, fetch=fetch), arrivals(data, count, RATE_SCALE), policy)
        mean_s = float(result.report["ttft_s"]["mean"])
        rows.append(Row(f"mooncake.ttft.{name.replace(' ', '_')}", said, mean_s, "s", peer=peer, how=_how(result)))
        return mean_s

    with placed_at_once():
        for name, policy, fetch, published in ABLATION:
            said = f"mean TTFT, {name} (published {published} s)"
            means.append(played(name, policy, fetch, said, f"{published} s"))
    for policy in ("random", "goodput"):
        played(f"shipped.{policy}", policy, True, f"mean TTFT, {policy} with the router's window and fetching, as shipped")
    for (one, *_), (other, *_), first, second in zip(ABLATION, ABLATION[1:], means, means[1:], strict=False):
        said = f"mean TTFT of {one} over that of {other}"
        theirs = {name: value for name, _, _, value in ABLATION}
        peer = f"{theirs[one] / theirs[other]:.2f} published"
        rows.append(Row(f"mooncake.order.{one}.{other}".replace(" ", "_"), said, first / second, "x", 1.0, peer=peer))
    return rows


def rejection(model: Path, data: Path, count: int) -> list[Row]:
    rows, lost = list[Row](), list[float]()
    for name, departures, published in REJECTION:

        def prepare(world: World, make: Callable[[], Departures] = departures) -> None:
            for router in world.routers:
                router.room.departures = make()

        configured = config(model, 15, 1, reject=True, tbt_s=REJECTION_TBT_S)
        result = simulate(configured, arrivals(data, count, 2.0), "conductor", prepare=prepare)
        lost.append(round(count * (1 - float(result.report["attainment"]["joint"]))))
        name_id, of = name.replace(" ", "_"), f"of {count}"
        said = f"requests lost at twice the rate, {name} (published {published} of 23,000)"
        rows.append(Row(f"mooncake.lost.{name_id}", said, lost[-1], of, how=_how(result)))
        said = f"of these refused on arrival, {name}"
        rows.append(Row(f"mooncake.rejected.{name_id}", said, float(result.report["rejected"]), of))
    for (one, *_), (other, *_), first, second in zip(REJECTION, REJECTION[1:], lost, lost[1:], strict=False):
        said = f"requests lost, {one} over {other}"
        rows.append(Row(f"mooncake.rejection.{other.replace(' ', '_')}", said, first / second if second else None, "x", 1.0))
    return rows


def _how(result: SimResult) -> str:
    said = result.report
    return (
        f"{said['requests']} requests, {said['rejected']} rejected, {said['failed']} failed, prefix hits "
        f"{said['prefix_hit_ratio']:.3f}, tbt p90 {said['tbt_s']['p90']:.3f} s, {result.wall_s:.0f} s wall"
    )


def rows(data: Path | None, quick: bool) -> list[Row]:
    if data is None:
        return [Row("mooncake", "needs the conversation trace (--data)", None, "")]
    count = 350 if quick else 4000
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "llama-3-70b"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(LLAMA3_70B))
        return [*ablation(model, data, count), *rejection(model, data, max(count, 900))]


def main() -> int:
    args = arguments(__doc__).parse_args()
    report(rows(args.data, args.quick), args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
