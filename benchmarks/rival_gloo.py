"""torch.distributed send and recv over gloo between two processes, nothing around them; run by `benchmarks.rounds`.

python rival_gloo.py BYTES_MAX

An even number of bytes is one tensor; an odd one, less one byte, goes in pieces of 4 MiB that are on their way together.
"""

from __future__ import annotations

import os
import socket
import sys
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PIECE = 4 * 2**20
END = 0


def pieces_of(memory: torch.Tensor, size: int) -> tuple[torch.Tensor, ...]:
    return memory[: size - 1].split(PIECE) if size % 2 else (memory[:size],)


def join(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", rank=rank, world_size=2)


def send_all(port: int, size_max: int) -> None:
    """Rank 1: sends as many bytes as each word from rank 0 says."""
    join(1, port)
    memory, word = torch.randint(0, 255, (size_max,), dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    while True:
        dist.recv(word, 0)
        if word.item() == END:
            return
        for work in [dist.isend(piece, 0) for piece in pieces_of(memory, int(word.item()))]:
            work.wait()


def main() -> None:
    size_max = int(sys.argv[1])
    port = free_port()
    other = mp.get_context("spawn").Process(target=send_all, args=(port, size_max), daemon=True)
    other.start()
    join(0, port)
    memory, word = torch.zeros(size_max, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    print("ready", torch.__version__, flush=True)
    for line in sys.stdin:
        size = int(line)
        started = time.perf_counter()
        dist.send(word.fill_(size), 1)
        for work in [dist.irecv(piece, 1) for piece in pieces_of(memory, size)]:
            work.wait()
        print("took", time.perf_counter() - started, flush=True)
    dist.send(word.fill_(END), 1)
    other.join(10)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    main()
