"""Moving 64 MiB of KV blocks between two processes over gRPC on loopback, for where nothing but gRPC gets through.

Claims
- grpc: a pull, asking and generation checks included (digest off), reaches what Mooncake's Transfer Engine does over TCP,
  tuned, and 0.9 x a bare grpc.aio stream of raw bytes at its best chunk size and channel options.
- The ratio to Arrow Flight and the cost of digests are stated.

    python -m benchmarks.kv_grpc [--quick] [--json FILE]
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from itertools import product

from benchmarks.kv_bare import CHUNKS, GRPC_OPTIONS, BareGrpc
from benchmarks.kv_source import MIB, source
from benchmarks.kv_tcp import BLOCK_BYTES, mooncakes, quickest
from benchmarks.rounds import in_turns, rival, timed, times
from benchmarks.rows import Row, arguments, report
from kvtransfer.channels import Channels
from kvtransfer.grpc_transport import GrpcTransport

SIZE = 64 * MIB
TRIES = 4
KEPT = 2  # of the bare streams, for the rounds that count


async def measure(quick: bool) -> list[Row]:
    rounds = 11 if quick else 31
    async with AsyncExitStack() as stack:
        bench = await stack.enter_async_context(source(BLOCK_BYTES, SIZE))
        channels = Channels()
        stack.push_async_callback(channels.close)
        plain, checked = (GrpcTransport(bench.dest, channels, digest=on, timeout_s=60.0) for on in (False, True))
        bare = {name: BareGrpc(bench.grpc_ports[name], bench.dest, options) for name, options in GRPC_OPTIONS.items()}
        for one in bare.values():
            stack.push_async_callback(one.close)
        streams = {
            f"{chunk // 1024} KiB, options {name}": timed(lambda name=name, chunk=chunk: bare[name].pull(SIZE, chunk))
            for name, chunk in product(bare, CHUNKS)
        }
        tried = await in_turns(streams, TRIES)
        best_streams = {name: streams[name] for name in sorted(tried, key=lambda name: tried[name])[:KEPT]}
        mooncake = await mooncakes(stack, SIZE, BLOCK_BYTES)
        flight = await stack.enter_async_context(rival("flight", "rival_flight.py", str(SIZE)))
        contenders = {
            "grpc": timed(lambda: bench.pull(plain, SIZE)),
            "digest": timed(lambda: bench.pull(checked, SIZE)),
            **best_streams,
            **{name: moves(SIZE) for name, moves in mooncake.items()},
            **({"flight": flight.moves(SIZE)} if flight else {}),
        }
        seen = await in_turns(contenders, rounds)
        return _rows(seen, quickest(seen, best_streams), quickest(seen, mooncake), rounds)


def _rows(seen: dict[str, float], bare: str, mooncake: str, rounds: int) -> list[Row]:
    how = f"blocks of 64 KiB, another process, median of {rounds} rounds in turns"
    peer, size = "mooncake-transfer-engine-non-cuda", SIZE / 1e9

    def stated(name: str) -> str:
        return f"{how}; {name} {size / seen[name]:.2f} GB/s" if name in seen else how

    return [
        Row("bare_grpc_64mib", "bare grpc.aio stream, 64 MiB", size / seen[bare], "GB/s", how=stated(bare)),
        Row("grpc_64mib_gbps", "gRPC pull, 64 MiB", size / seen["grpc"], "GB/s", how=how),
        Row("grpc_64mib", "gRPC pull against bare", times(seen, "grpc", bare), "x", 0.9, ">=", "bare grpc.aio", stated(bare)),
        Row("grpc_digest_64mib", "the same with digests", times(seen, "digest", bare), "x", None, ">=", "bare grpc.aio", how),
        Row(
            "grpc_mooncake_64mib", "gRPC pull against Mooncake's TCP", times(seen, "grpc", mooncake),
            "x", 1.0, ">=", peer, stated(mooncake),
        ),
        Row(
            "grpc_flight_64mib", "gRPC pull against Arrow Flight", times(seen, "grpc", "flight"),
            "x", None, ">=", "pyarrow.flight", stated("flight"),
        ),
    ]  # fmt: skip


def main() -> None:
    options = arguments(__doc__).parse_args()
    report(asyncio.run(measure(options.quick)), options.json)


if __name__ == "__main__":
    main()
