"""Pulling KV blocks out of another process's mapped arena, against memcpy, and against NIXL between two processes.

Claims
- shm, asking included, digest off: 0.5 x a one-thread memcpy of the same bytes between two mapped, pre-faulted regions at
  16 MiB, 0.8 x at 64 MiB; the copy alone, without asking, 0.9 x.
- shm is 2 x as fast as NIXL's best same-host configuration at 64 MiB.
- With digests, from scattered into scattered blocks, and the time of a pull of a single block: stated.

    python -m benchmarks.kv_shm [--quick] [--json FILE] [--shm-dir DIR]
"""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import AsyncExitStack

import numpy as np

from benchmarks.kv_source import EPOCH, KEY, MIB, Source, source
from benchmarks.rounds import Go, in_turns, rival, timed, times
from benchmarks.rows import Row, arguments, report
from kvtransfer.copier import Copier, CopyJob, Memory
from kvtransfer.shared_arena import MappedArena
from kvtransfer.shm import ShmTransport

BLOCK_BYTES = 96 * 1024  # the demo model's: 16 tokens of 6 layers, 2 heads of 64, fp32
SIZES_MIB = (16, 64)
BARS = {16: 0.5, 64: 0.8}
NIXL: dict[str, dict[str, str]] = {  # by name, the environment it is started with
    "NIXL": {},
    "NIXL over cma": {"UCX_TLS": "cma,posix,tcp,self"},
}


async def pulls(bench: Source, directory: str, rounds: int) -> list[Row]:
    theirs = MappedArena(bench.kv.arena_path, EPOCH, directory)
    plain, checked = (ShmTransport(Copier(bench.dest, digest=on, timeout_s=60.0), directory) for on in (False, True))
    how = f"blocks of {BLOCK_BYTES // 1024} KiB, another process's arena, median of {rounds} rounds in turns"
    rows = []
    for mib in SIZES_MIB:
        count = bench.count(mib * MIB)
        part = bench.records[:count]
        job = CopyJob(Memory(theirs.blocks, theirs.generations), bench.dest, part, range(count), False)
        order = list(range(count))
        random.Random(mib).shuffle(order)
        shuffled = [part[n] for n in order]

        async def memcpy(count: int = count) -> None:
            np.copyto(bench.dest[:count], theirs.blocks[:count])

        async def copy(job: CopyJob = job) -> None:
            job.run(lambda: False)

        async def scattered(records: list = shuffled, to: list[int] = order[::-1]) -> None:
            await plain.pull(bench.kv, KEY, records, to)

        seen = await in_turns(
            {
                "memcpy": timed(memcpy),
                "copy": timed(copy),
                "shm": _pull(bench, plain, mib),
                "digest": _pull(bench, checked, mib),
                "scattered": timed(scattered),
            },
            rounds,
        )
        size = count * BLOCK_BYTES / 1e9
        against = {name: times(seen, name, "memcpy") for name in seen}
        rows += [
            Row(f"memcpy_{mib}mib", f"one-thread memcpy, {mib} MiB", size / seen["memcpy"], "GB/s", how=how),
            Row(f"shm_{mib}mib", f"shm pull, {mib} MiB, digest off", against["shm"], "x", BARS[mib], ">=", "memcpy", how),
            Row(f"shm_copy_{mib}mib", f"the copy alone, {mib} MiB", against["copy"], "x", 0.9, ">=", "memcpy", how),
            Row(f"shm_digest_{mib}mib", f"shm pull with digests, {mib} MiB", against["digest"], "x", peer="memcpy", how=how),
            Row(
                f"shm_scattered_{mib}mib",
                f"shm pull of shuffled blocks, {mib} MiB",
                against["scattered"],
                "x",
                peer="memcpy",
                how=how,
            ),
        ]
    one = [await _one_block(bench, checked, n) for n in range(min(len(bench.records), 10 * rounds))]
    rows.append(Row("shm_block", "shm pull of one block", sorted(one)[len(one) // 2] * 1e6, "us", None, "<=", how=how))
    await plain.close()
    await checked.close()
    return rows


def _pull(bench: Source, transport: ShmTransport, mib: int) -> Go:
    return timed(lambda: bench.pull(transport, mib * MIB))


async def _one_block(bench: Source, transport: ShmTransport, index: int) -> float:
    started = time.perf_counter()
    await transport.pull(bench.kv, KEY, bench.records[index : index + 1], [0])
    return time.perf_counter() - started


async def against_nixl(bench: Source, directory: str, rounds: int) -> list[Row]:
    """One configuration at a time, halted in our turns: its progress threads spin on both cores."""
    size = bench.count(64 * MIB) * BLOCK_BYTES
    plain, checked = (ShmTransport(Copier(bench.dest, digest=on, timeout_s=60.0), directory) for on in (False, True))
    rows: list[tuple[str, dict[str, float]]] = []
    for name, settings in NIXL.items():
        async with rival("nixl", "rival_nixl.py", str(size), str(BLOCK_BYTES), still=True, **settings) as nixl:
            if nixl is None:
                continue
            contenders = {"shm": _pull(bench, plain, 64), "digest": _pull(bench, checked, 64), name: nixl.moves(size)}
            seen = await in_turns(contenders, max(5, rounds // 3))
            if name in seen:
                rows.append((name, seen))
    await plain.close()
    await checked.close()
    if not rows:
        return [Row("shm_nixl_64mib", "shm pull against NIXL's best, 64 MiB", None, "x", 2.0, ">=", "nixl")]
    best, seen = min(rows, key=lambda row: row[1][row[0]] / row[1]["shm"])
    gbps = ", ".join(f"{name} {size / told[name] / 1e9:.2f} GB/s" for name, told in rows)
    how = f"two processes, READ or WRITE, in one piece or block by block, whichever is quicker; {gbps}"
    return [
        Row("shm_nixl_64mib", "shm pull against NIXL's best, 64 MiB", times(seen, "shm", best), "x", 2.0, ">=", "nixl", how),
        Row("shm_digest_nixl_64mib", "the same with digests", times(seen, "digest", best), "x", peer="nixl", how=how),
    ]


async def measure(shm_dir: str, quick: bool) -> list[Row]:
    rounds = 15 if quick else 41
    async with AsyncExitStack() as stack:
        bench = await stack.enter_async_context(source(BLOCK_BYTES, SIZES_MIB[-1] * MIB, shm_dir))
        return [*await pulls(bench, bench.directory, rounds), *await against_nixl(bench, bench.directory, rounds)]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shm-dir", default="/dev/shm")
    options = parser.parse_args()
    report(asyncio.run(measure(options.shm_dir, options.quick)), options.json)


if __name__ == "__main__":
    main()
