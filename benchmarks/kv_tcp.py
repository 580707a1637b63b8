"""Moving KV blocks between two processes over TCP on loopback, in blocks of 64 KiB.

Claims
- tcp: a pull, asking and generation checks included (digest off), reaches 0.9 x what a bare Python sendmsg/recvmsg_into pair
  with two connections does, at 16 MiB and 64 MiB. (Its sockets are tuned as the product tunes them, the bare ones are left
  as they come.)
- tcp reaches 2 x what the Mooncake Transfer Engine's TCP does, tuned: connection pool on, the better of slices of 4 and
  16 MiB, the quickest of reads, writes and batches of either.
- A pull allocates nothing that grows with its bytes, on neither side: what Python holds at its peak is below 1 %.
- With digests, and the time of a pull of a single block: stated.

Every figure is the median over rounds in which everybody takes a turn.

    python -m benchmarks.kv_tcp [--quick] [--json FILE]
"""

from __future__ import annotations

import asyncio
import time
import tracemalloc
from collections.abc import Mapping
from contextlib import AsyncExitStack
from statistics import median

from benchmarks.kv_bare import BareSockets
from benchmarks.kv_source import KEY, MIB, Source, source
from benchmarks.rounds import Go, in_turns, rival, timed, times
from benchmarks.rows import Row, arguments, report
from kvtransfer.tcp import TcpTransport

BLOCK_BYTES = 64 * 1024
SIZES_MIB = (16, 64)
CONNECTIONS = 2
MOONCAKE = {
    f"mooncake, slices of {mib} MiB": {"MC_TCP_ENABLE_CONNECTION_POOL": "1", "MC_TCP_SLICE_SIZE": str(mib * MIB)}
    for mib in (4, 16)
}


async def mooncakes(stack: AsyncExitStack, size_max: int, block_bytes: int) -> dict[str, Go]:
    """By name, what starts a transfer of `size_max` bytes of each tuning that runs here."""
    found = {}
    for name, settings in MOONCAKE.items():
        words = (str(size_max), str(block_bytes))
        made = await stack.enter_async_context(rival("mooncake", "rival_mooncake.py", *words, **settings))
        if made is not None:
            found[name] = made.moves
    return found


def quickest(seen: Mapping[str, float], names: Mapping[str, object]) -> str:
    """Of `names`, whoever took least; any when none was measured."""
    return min((name for name in names if name in seen), key=lambda name: seen[name], default="")


async def measure(quick: bool) -> list[Row]:
    rounds = 15 if quick else 41
    async with AsyncExitStack() as stack:
        bench = await stack.enter_async_context(source(BLOCK_BYTES, SIZES_MIB[-1] * MIB))
        plain, checked = (TcpTransport(bench.dest, digest=on, timeout_s=60.0, connections=CONNECTIONS) for on in (False, True))
        for transport in (plain, checked):
            stack.push_async_callback(transport.close)
        bare = BareSockets(bench.socket_port, bench.dest, CONNECTIONS)
        stack.callback(bare.close)
        mooncake = await mooncakes(stack, SIZES_MIB[-1] * MIB, BLOCK_BYTES)
        rows = []
        for mib in SIZES_MIB:
            size = mib * MIB
            contenders = {
                "bare": timed(lambda size=size: bare.pull(bench.count(size))),
                "tcp": timed(lambda size=size: bench.pull(plain, size)),
                "digest": timed(lambda size=size: bench.pull(checked, size)),
                **{name: moves(size) for name, moves in mooncake.items()},
            }
            rows += _rows(mib, await in_turns(contenders, rounds), mooncake, rounds)
        rows += await _allocations(bench, plain)
        one = [await _one_block(bench, plain, n) for n in range(min(len(bench.records), 10 * rounds))]
        rows.append(Row("tcp_block", "tcp pull of one block", median(one) * 1e6, "us", None, "<="))
        return rows


def _rows(mib: int, seen: dict[str, float], mooncake: Mapping[str, object], rounds: int) -> list[Row]:
    how = f"blocks of 64 KiB, up to {CONNECTIONS} connections, another process, median of {rounds} rounds in turns"
    best, size = quickest(seen, mooncake), mib * MIB / 1e9
    rival_how = f"{how}; {best}" + (f" {size / seen[best]:.2f} GB/s" if best else "not installed")
    against = "mooncake-transfer-engine-non-cuda"
    return [
        Row(f"bare_{mib}mib", f"bare sendmsg/recvmsg_into, {mib} MiB", size / seen["bare"], "GB/s", how=how),
        Row(f"tcp_{mib}mib_gbps", f"tcp pull, {mib} MiB", size / seen["tcp"], "GB/s", how=how),
        Row(f"tcp_{mib}mib", f"tcp pull against bare, {mib} MiB", times(seen, "tcp", "bare"), "x", 0.9, ">=", "bare", how),
        Row(f"tcp_digest_{mib}mib", "the same with digests", times(seen, "digest", "bare"), "x", peer="bare", how=how),
        Row(
            f"tcp_mooncake_{mib}mib", f"tcp pull against Mooncake's TCP, {mib} MiB", times(seen, "tcp", best),
            "x", 2.0, peer=against, how=rival_how,
        ),
        Row(
            f"tcp_digest_mooncake_{mib}mib", "the same with digests", times(seen, "digest", best),
            "x", peer=against, how=rival_how,
        ),
    ]  # fmt: skip


async def _allocations(bench: Source, transport: TcpTransport) -> list[Row]:
    size = SIZES_MIB[-1] * MIB
    await bench.ask("trace")
    tracemalloc.start()
    await bench.pull(transport, size)
    _, here = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    there = int(await bench.ask("peak"))
    how = f"tracemalloc's peak over one pull of {size // MIB} MiB; {here} bytes here, {there} at the source"
    claim = f"memory held at its peak for a tcp pull of {size // MIB} MiB"
    return [Row("tcp_allocated", claim, 100 * max(here, there) / size, "%", 1.0, "<=", "its bytes", how)]


async def _one_block(bench: Source, transport: TcpTransport, index: int) -> float:
    started = time.perf_counter()
    await transport.pull(bench.kv, KEY, bench.records[index : index + 1], [0])
    return time.perf_counter() - started


def main() -> None:
    options = arguments(__doc__).parse_args()
    report(asyncio.run(measure(options.quick)), options.json)


if __name__ == "__main__":
    main()
