"""Moving KV blocks between two processes over TCP on loopback, in blocks of 64 KiB.

Claims
- tcp: a pull, asking and generation checks included (digest off), reaches 0.9 x what a bare Python sendmsg/recvmsg_into pair
  with as many connections does, at 16 MiB and 64 MiB.
- tcp reaches 2 x what the Mooncake Transfer Engine's TCP does with its connection pool on and slices of 4 MiB.
- With digests, and the time of a pull of a single block: stated.

Every figure is the median over rounds; ours and the bare pair take turns, so that both see the same machine.

    python -m benchmarks.kv_tcp [--quick] [--json FILE]

Mooncake's rows are empty until `python -m benchmarks.peers mooncake` has installed it (it needs Debian's libibverbs1).
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, MutableSequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise
from statistics import median
from typing import cast

import numpy as np

from benchmarks.peers import python_of
from benchmarks.rows import Row, arguments, report
from core.blocks import BlockRecord, KvSource
from core.clock import SystemClock
from core.inventory import Inventory
from core.request import AttemptKey
from kvtransfer.arena import Blocks, HostArena
from kvtransfer.codec import digests_of
from kvtransfer.exports import Exports
from kvtransfer.tcp import TcpTransport
from kvtransfer.tcp_server import TcpServer

BLOCK_BYTES = 64 * 1024
SIZES_MIB = (16, 64)
CONNECTIONS = 2
KEY = AttemptKey("bench", 1)
EPOCH = 1
MIB = 2**20
IOV_MAX = 1024
MOONCAKE = {"MC_TCP_ENABLE_CONNECTION_POOL": "1", "MC_TCP_SLICE_SIZE": str(4 * MIB)}


async def source_main() -> None:
    """The other process: announced blocks behind our server, the same bytes behind a bare one, until standard input ends."""
    num_blocks = SIZES_MIB[-1] * MIB // BLOCK_BYTES
    arena = HostArena(num_blocks, BLOCK_BYTES)
    arena.bytes_view()[:] = np.random.default_rng(0).integers(0, 256, arena.bytes_view().shape, np.uint8)
    inventory = Inventory(num_blocks, cast(MutableSequence[int], arena.generation_words()))
    blocks = inventory.allocate(num_blocks)
    exports = Exports(EPOCH, arena, inventory, SystemClock())
    exports.open(KEY, 3600.0)
    digests = digests_of(arena.bytes_view(), blocks)
    places = [(block, inventory.generation(block), digest) for block, digest in zip(blocks, digests, strict=True)]
    exports.announce(KEY, [BlockRecord(i, b"", *place, 16) for i, place in enumerate(places)])
    server = TcpServer(exports, "127.0.0.1:0")
    with socket.create_server(("127.0.0.1", 0)) as bare:
        views = [arena.bytes_view()[block].data for block in blocks]
        threading.Thread(target=_serve_bare, args=(bare, views), daemon=True).start()
        port = bare.getsockname()[1]
        print(json.dumps({"address": server.address, "bare_port": port, "places": places}), flush=True)
        await asyncio.to_thread(sys.stdin.read)
    server.close()
    await exports.close()


def _serve_bare(listener: socket.socket, views: list[memoryview]) -> None:
    while True:
        try:
            sock, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_send_bare, args=(sock, views), daemon=True).start()


def _send_bare(sock: socket.socket, views: list[memoryview]) -> None:
    """Two numbers of four bytes come in, first and last block; those blocks go out, nothing else."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with sock:
        while order := sock.recv(8, socket.MSG_WAITALL):
            left = views[int.from_bytes(order[:4]) : int.from_bytes(order[4:])]
            while left:
                left = _rest(left, sock.sendmsg(left[:IOV_MAX]))


def _receive_bare(sock: socket.socket, dest: Blocks, first: int, last: int) -> None:
    sock.sendall(first.to_bytes(4) + last.to_bytes(4))
    left = [dest[block].data for block in range(first, last)]
    while left:
        left = _rest(left, sock.recvmsg_into(left[:IOV_MAX], 0, socket.MSG_WAITALL)[0])


def _rest(views: list[memoryview], done: int) -> list[memoryview]:
    while views and done >= len(views[0]):
        whole = max(1, min(len(views), done // len(views[0])))
        done -= sum(map(len, views[:whole]))
        views = views[whole:]
    return [views[0][done:], *views[1:]] if done else views


class Bare:
    """As many connections as a pull uses, each with a thread, and an equal share of the blocks for each."""

    def __init__(self, port: int, dest: Blocks) -> None:
        self._sockets = [socket.create_connection(("127.0.0.1", port)) for _ in range(CONNECTIONS)]
        self._threads = ThreadPoolExecutor(CONNECTIONS)
        self._dest = dest

    def pull(self, count: int) -> None:
        bounds = [count * n // CONNECTIONS for n in range(CONNECTIONS + 1)]
        jobs = [
            self._threads.submit(_receive_bare, sock, self._dest, *part)
            for sock, part in zip(self._sockets, pairwise(bounds), strict=True)
        ]
        for job in jobs:
            job.result(60)

    def close(self) -> None:
        for sock in self._sockets:
            sock.close()
        self._threads.shutdown()


async def _in_turns(pull: Callable[[], object], bare: Callable[[], None], rounds: int) -> tuple[float, float]:
    """Seconds of each, medians."""
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(rounds + 2):
        started = time.perf_counter()
        await cast("asyncio.Future[object]", pull())
        pulled = time.perf_counter()
        await asyncio.to_thread(bare)
        theirs.append(time.perf_counter() - pulled)
        ours.append(pulled - started)
    return median(ours[2:]), median(theirs[2:])


async def measure(quick: bool) -> list[Row]:
    pipe, rounds = asyncio.subprocess.PIPE, 15 if quick else 41
    command = [sys.executable, "-m", "benchmarks.kv_tcp", "--source"]
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, limit=MIB)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        told = json.loads(await asyncio.wait_for(process.stdout.readline(), 60))
        return await _rows(told, rounds)
    finally:
        process.stdin.close()
        await process.wait()


async def _rows(told: dict[str, object], rounds: int) -> list[Row]:
    places = cast("list[list[int]]", told["places"])
    records = [BlockRecord(i, b"", block, generation, digest, 16) for i, (block, generation, digest) in enumerate(places)]
    address = str(told["address"])
    source = KvSource("bench", EPOCH, "", "", "", len(records), ("tcp",), address)
    dest = HostArena(len(records), BLOCK_BYTES).bytes_view()
    plain, checked = (TcpTransport(dest, digest=on, timeout_s=60.0, connections=CONNECTIONS) for on in (False, True))
    how = f"blocks of 64 KiB, {CONNECTIONS} connections, another process, median of {rounds} rounds in turns"
    rows = []
    with ExitStack() as stack:
        bare = Bare(cast(int, told["bare_port"]), dest)
        stack.callback(bare.close)
        for mib in SIZES_MIB:
            count = mib * MIB // BLOCK_BYTES
            part, size = records[:count], mib * MIB / 1e9

            def bare_pull(count: int = count) -> None:
                bare.pull(count)

            def pull(transport: TcpTransport, part: list[BlockRecord] = part) -> Callable[[], object]:
                return lambda: transport.pull(source, KEY, part, range(len(part)))

            took_s, bare_s = await _in_turns(pull(plain), bare_pull, rounds)
            digested_s, bare_too_s = await _in_turns(pull(checked), bare_pull, rounds)
            mooncake = _mooncake_gbps(mib)
            rows += [
                Row(f"bare_{mib}mib", f"bare sendmsg/recvmsg_into, {mib} MiB", size / bare_s, "GB/s", how=how),
                Row(f"tcp_{mib}mib_gbps", f"tcp pull, {mib} MiB", size / took_s, "GB/s", how=how),
                Row(f"tcp_{mib}mib", f"tcp pull against bare, {mib} MiB", bare_s / took_s, "x", 0.9, ">=", "bare", how),
                Row(f"tcp_digest_{mib}mib", "the same with digests", bare_too_s / digested_s, "x", peer="bare", how=how),
                Row(
                    f"tcp_mooncake_{mib}mib",
                    f"tcp pull against Mooncake's TCP, {mib} MiB",
                    size / took_s / mooncake if mooncake else None,
                    "x",
                    2.0,
                    peer="mooncake-transfer-engine-non-cuda",
                    how=f"{how}; Mooncake: one read of {mib} MiB, {MOONCAKE}",
                ),
            ]
    one = [(await plain.pull(source, KEY, [record], [0])).seconds for record in records[: 10 * rounds]]
    rows.append(Row("tcp_block", "tcp pull of one block", median(one) * 1e6, "us", None, "<=", how=how))
    await plain.close()
    await checked.close()
    return rows


def _mooncake_gbps(mib: int) -> float | None:
    """Measured in its own environment; None when it is not installed or does not start."""
    python = python_of("mooncake")
    if python is None:
        return None
    script = os.path.join(os.path.dirname(__file__), "rival_mooncake.py")
    env = {**os.environ, **MOONCAKE}
    try:
        done = subprocess.run(
            [python, script, str(mib * MIB)], env=env, capture_output=True, text=True, timeout=120, check=True
        )
        return float(done.stdout.strip().splitlines()[-1].removeprefix("GB/s "))
    except (subprocess.SubprocessError, ValueError, IndexError) as error:
        print(f"mooncake: not measured ({error}); it needs Debian's libibverbs1", file=sys.stderr)
        return None


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--source", action="store_true", help="run as the source process")
    options = parser.parse_args()
    if options.source:
        asyncio.run(source_main())
        return
    report(asyncio.run(measure(options.quick)), options.json)


if __name__ == "__main__":
    main()
