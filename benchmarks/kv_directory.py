"""The directory of the KV plane: how long a lookup takes, what an entry costs, and whether either changes with size.

Claims: a prefix of 2,048 blocks is looked up in 0.5 ms in this process and in 3 ms in a Redis on this host; put and locate
rates stay within 2× from ten thousand to ten million entries (one million with --quick). Bytes per entry are stated.

Tables are filled as workers fill them, prompt by prompt, 2,048 keys each, from one node. A lookup is of one of those prompts,
a different one each time. Rates are medians over lookups, and over announcements of 16,384 keys at the given size; the time
to make the keys is not counted. The Redis is the one that `make setup` brings, on a port of loopback.
"""

from __future__ import annotations

import asyncio
import gc
import random
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from benchmarks.rows import Row, arguments, report
from cli.redis_server import RedisServer, redis_server
from core.blocks import KEY_BYTES, BlockKey, KvLayout, KvSource
from core.clock import SystemClock
from core.request import WorkerRole
from kvtransfer.directory import Directory, NodeRecord, Tier
from kvtransfer.local_directory import ClockedDirectory, LocalDirectory
from kvtransfer.redis_directory import RedisDirectory

PREFIX = 2048
PIECE = 16_384
TTL_S = 36_000.0
TIMEOUT_S = 60.0
LAYOUT = KvLayout(b"\x01" * 16, "float32", 32, 8, 128, 16)
NODE = NodeRecord(KvSource("store-0", 1, "127.0.0.1:1"), LAYOUT, WorkerRole.STORE)
Measured = dict[str, float]


def prompt(number: int) -> list[BlockKey]:
    """Keys of the number-th prompt; the same every time, so that none has to be kept."""
    blob = random.Random(number).randbytes(PREFIX * KEY_BYTES)
    return [blob[at : at + KEY_BYTES] for at in range(0, len(blob), KEY_BYTES)]


def pieces(first: int, last: int) -> Iterator[list[tuple[BlockKey, Tier]]]:
    """Prompts `first` to `last` (exclusive) in announcements of PIECE keys."""
    step = PIECE // PREFIX
    for start in range(first, last, step):
        numbers = range(start, min(start + step, last))
        yield [(key, Tier.DRAM) for number in numbers for key in prompt(number)]


async def filled(directory: Directory, first: int, last: int) -> list[float]:
    """Announces prompts; seconds per key of each announcement."""
    taken = []
    for added in pieces(first, last):
        began = time.perf_counter()
        assert await directory.announce("store-0", 1, added, [])
        taken.append((time.perf_counter() - began) / len(added))
    return taken


async def looked_up(directory: Directory, prompts: int, rounds: int) -> list[float]:
    """Seconds of each lookup of a whole prompt, which must be found."""
    dice = random.Random(prompts)
    taken = []
    for _ in range(rounds):
        keys = prompt(dice.randrange(prompts))
        began = time.perf_counter()
        found = await directory.locate(keys)
        taken.append(time.perf_counter() - began)
        assert len(found.holders) == PREFIX, "an entry is missing"
    return taken


async def at_sizes(
    make: Callable[[], Awaitable[Directory]], used: Callable[[], int], sizes: list[int], rounds: int
) -> dict[int, Measured]:
    """Fills one directory further and further and measures it at each size."""
    directory = await make()
    assert not await directory.join(NODE, TTL_S)
    gc.collect()
    gc.freeze()
    empty, done, found = used(), 0, {}
    for size in sizes:
        prompts = -(-size // PREFIX)
        puts = await filled(directory, done, prompts)
        done = prompts
        bytes_used = used() - empty
        again = await filled(directory, prompts, prompts + 64)  # the same number of keys at each size
        done += 64
        lookups = await looked_up(directory, done, rounds)
        best = sorted(lookups)[len(lookups) // 10]
        found[size] = {
            "put_s": statistics.median(again or puts),
            "locate_s": statistics.median(lookups),
            "locate_p10_s": best,
            "bytes": bytes_used / (prompts * PREFIX),
        }
        sys.stderr.write(f"  {size:>10,} entries: {found[size]}\n")
    await directory.close()
    return found


def resident_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


def redis_bytes(server: RedisServer) -> int:
    from redis import Redis

    with Redis(port=server.port) as client:
        return int(client.info("memory")["used_memory"])


async def local(sizes: list[int], rounds: int) -> dict[int, Measured]:
    async def make() -> Directory:
        return ClockedDirectory(LocalDirectory(), SystemClock())

    return await at_sizes(make, resident_bytes, sizes, rounds)


async def in_redis(server: RedisServer, sizes: list[int], rounds: int) -> dict[int, Measured]:
    async def make() -> Directory:
        return RedisDirectory(server.url, timeout_s=TIMEOUT_S)

    return await at_sizes(make, lambda: redis_bytes(server), sizes, rounds)


def rows(form: str, bar_ms: float, found: dict[int, Measured]) -> Iterator[Row]:
    sizes = list(found)
    reached = 1_000_000 if 1_000_000 in found else sizes[-1]
    how = f"median over prompts of {PREFIX:,} keys, {reached:,} entries, one node"
    name = "this process" if form == "local" else "Redis"
    took_ms = found[reached]["locate_s"] * 1e3
    yield Row(f"directory_{form}_locate_ms", f"lookup of a 2,048-block prefix, {name}", took_ms, "ms", bar_ms, "<=", how=how)
    p10_ms = found[reached]["locate_p10_s"] * 1e3
    yield Row(f"directory_{form}_locate_p10_ms", f"the same, quickest tenth, {name}", p10_ms, "ms", how=how)
    for size, at in found.items():
        label = f"{size:,} entries, {name}"
        yield Row(f"directory_{form}_bytes_{size}", f"bytes per entry, {label}", at["bytes"], "B")
        yield Row(f"directory_{form}_put_{size}", f"put, {label}", 1e-3 / at["put_s"], "k keys/s")
        yield Row(f"directory_{form}_locate_{size}", f"locate, {label}", 1e-3 * PREFIX / at["locate_s"], "k keys/s")
    for act in ("put", "locate"):
        seconds = [at[f"{act}_s"] for at in found.values()]
        claim = f"{act} from {sizes[0]:,} to {sizes[-1]:,} entries, slowest / quickest, {name}"
        yield Row(f"directory_{form}_{act}_flat", claim, max(seconds) / min(seconds), "x", 2.0, "<=")


def main() -> None:
    options = arguments(__doc__).parse_args()
    sizes = [10_000, 100_000, 1_000_000] + ([] if options.quick else [10_000_000])
    rounds = 200 if options.quick else 400
    sys.stderr.write("Redis\n")
    with redis_server() as server:
        redis_found = asyncio.run(in_redis(server, sizes, rounds))
    sys.stderr.write("this process\n")
    local_found = asyncio.run(local(sizes, rounds))
    report([*rows("local", 0.5, local_found), *rows("redis", 3.0, redis_found)], options.json)


if __name__ == "__main__":
    main()
