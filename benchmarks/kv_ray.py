"""Moving the same 64 MiB of tensors between two processes: our pulls against Ray's object store between two actors.

Claims
- Ray's object store is beaten by shm and by tcp; the ratios, those with digests too, are stated.

    python -m benchmarks.kv_ray [--quick] [--json FILE]
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

from benchmarks.kv_source import MIB, source
from benchmarks.rounds import in_turns, rival, timed, times
from benchmarks.rows import Row, arguments, report
from kvtransfer.copier import Copier
from kvtransfer.shm import ShmTransport
from kvtransfer.tcp import TcpTransport
from kvtransfer.transport import Transport

BLOCK_BYTES = 64 * 1024
SIZE = 64 * MIB


async def measure(quick: bool) -> list[Row]:
    rounds = 11 if quick else 31
    async with AsyncExitStack() as stack:
        bench = await stack.enter_async_context(source(BLOCK_BYTES, SIZE))
        transports: dict[str, Transport] = {}
        for on in (False, True):
            copier = Copier(bench.dest, digest=on, timeout_s=60.0)
            transports |= {
                f"shm{' with digests' * on}": ShmTransport(copier, bench.directory),
                f"tcp{' with digests' * on}": TcpTransport(bench.dest, digest=on, timeout_s=60.0),
            }
        for transport in transports.values():
            stack.push_async_callback(transport.close)
        contenders = {name: timed(lambda to=to: bench.pull(to, SIZE)) for name, to in transports.items()}
        ray = await stack.enter_async_context(rival("ray", "rival_ray.py", str(SIZE), ours=True))
        if ray is not None:
            contenders |= {"array": ray.moves(SIZE), "tensor": ray.moves(SIZE + 1)}
        seen = await in_turns(contenders, rounds)
        how = f"blocks of 64 KiB, another process, median of {rounds} rounds in turns"
        return [_row(seen, name, kind, how) for kind in ("array", "tensor") for name in transports]


def _row(seen: dict[str, float], ours: str, kind: str, how: str) -> Row:
    what = {"array": "a NumPy array, its best", "tensor": "a torch tensor"}[kind]
    told = f"{how}; Ray {SIZE / seen[kind] / 1e9:.2f} GB/s" if kind in seen else how
    bar = None if "digests" in ours else 1.0
    row_id = f"{ours.replace(' with digests', '_digest')}_ray_{kind}_64mib"
    return Row(
        row_id, f"{ours} pull, 64 MiB, against Ray moving {what}", times(seen, ours, kind), "x", bar, peer="ray", how=told
    )


def main() -> None:
    options = arguments(__doc__).parse_args()
    report(asyncio.run(measure(options.quick)), options.json)


if __name__ == "__main__":
    main()
