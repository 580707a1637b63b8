"""Process groups of two over torch.distributed: gloo between hosts without GPUs, nccl between GPUs.

Only the helper process imports this. A group is built on a store of its own, without `init_process_group`, so any number of
them stand side by side. What gloo does (torch 2.13, measured):

- a wait lets go of the interpreter lock and keeps to its timeout, whatever the peer does;
- when the peer is killed, waits for what has not begun fail within milliseconds; when it is stopped, at the timeout;
- a wait that timed out closes the group's connections. Nothing is written into a tensor after that. `abort` and `shutdown`
  do nothing, so `abort` here lets a receive that nothing answers time out;
- a message that had begun to arrive or to leave when the connection was closed tells nobody: its wait goes on to its own
  timeout. The thread is left to that, its group and its blocks are not;
- a message longer than the tensor that waits for it ends the process (`std::terminate` in gloo's own thread).
"""

from __future__ import annotations

import socket
import time
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed

from kvtransfer.arena import Blocks
from kvtransfer.spans import coalesce

dist: Any = torch.distributed  # which has more than its stubs name
SEQS = 2**20
_ABORT_TAG = SEQS  # no request has it
_ABORT_S = 0.001
AHEAD = 16  # pieces on their way at a time: the next tensor waits when one is full
BUFFERED_AHEAD = 4  # where pieces go through buffers, which shall stay in the cache


class GroupError(Exception):
    """The group is of no use any more."""


class Backend:
    """`gloo` or `nccl`: the name, the device that tensors must lie on, and how a group is made and broken."""

    def __init__(self, name: str, host: str) -> None:
        """`name`: "auto" is nccl where there is a GPU. `host`: the address others reach us at."""
        cuda = torch.cuda.is_available() and dist.is_nccl_available()
        self.name = name if name != "auto" else ("nccl" if cuda else "gloo")
        if self.name == "nccl" and not cuda:
            raise GroupError("no GPU that nccl could use")
        self.device = torch.device("cuda", torch.cuda.current_device()) if self.name == "nccl" else None
        self._host = host
        self._gloo = dist.ProcessGroupGloo.create_device(hostname=host) if self.device is None else None

    def open_store(self, timeout_s: float) -> Any:
        """Where the two halves find each other. Listens on our address alone, until the group stands."""
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        listener = socket.create_server((self._host, 0), family=family)
        port = listener.getsockname()[1]
        return dist.TCPStore(
            self._host,
            port,
            None,
            is_master=True,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )

    def find_store(self, address: str, timeout_s: float) -> Any:
        host, _, port = address.rpartition(":")
        return dist.TCPStore(
            host.strip("[]"), int(port), None, is_master=False, timeout=timedelta(seconds=timeout_s), wait_for_workers=False
        )

    def make(self, store: Any, rank: int, timeout_s: float) -> Any:
        """Comes back when both halves are there, or raises RuntimeError at the timeout."""
        if self.device is not None:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timedelta(seconds=timeout_s)
            group = dist.ProcessGroupNCCL(store, rank, 2, options)
            group.eager_connect_single_device(self.device)
            return group
        options = dist.ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=timeout_s)
        options._threads = 1
        options._devices = [self._gloo]
        return dist.ProcessGroupGloo(store, rank, 2, options)

    def abort(self, group: Any, peer: int) -> bool:
        """From any thread. Says whether it is certain that nothing is read or written any more, whoever still waits."""
        if self.device is not None:
            group.abort()
            return False
        try:
            group.recv([torch.zeros(1, dtype=torch.uint8)], peer, _ABORT_TAG).wait(timedelta(seconds=_ABORT_S))
        except RuntimeError:
            return True  # as intended: the connection is closed
        return False


class Group:
    """One end of a group. `make`, `send` and `receive` in one thread, `abort` from any."""

    def __init__(self, name: str, rank: int, backend: Backend) -> None:
        self.name = name
        self._rank = rank
        self._backend = backend
        self._group: Any = None
        self._aborted = False
        self._buffers: dict[int, torch.Tensor] = {}

    def make(self, store: Any, timeout_s: float) -> None:
        try:
            self._group = self._backend.make(store, self._rank, timeout_s)
        except RuntimeError as error:
            raise GroupError(f"the two halves did not meet within {timeout_s:g} s: {_brief(error)}") from None
        if self._aborted:
            self.abort()
            raise GroupError("the group was given up")

    def send(self, seq: int, arena: Blocks, pieces: list[list[int]], timeout_s: float) -> None:
        """Comes back when the last byte was taken. Raises GroupError."""
        self._move(seq, arena, pieces, timeout_s, receiving=False)

    def receive(self, seq: int, arena: Blocks, pieces: list[list[int]], timeout_s: float, arrived: Any) -> None:
        """Calls `arrived(n)` when piece n lies in its blocks. Raises GroupError."""
        self._move(seq, arena, pieces, timeout_s, receiving=True, arrived=arrived)

    def abort(self) -> bool:
        """Says whether it is certain that nothing of the group touches the arena any more, whatever its thread waits for."""
        self._aborted = True
        return self._group is None or self._backend.abort(self._group, 1 - self._rank)

    def _move(
        self, seq: int, arena: Blocks, pieces: list[list[int]], timeout_s: float, *, receiving: bool, arrived: Any = None
    ) -> None:
        deadline = time.monotonic() + timeout_s
        ahead = AHEAD if all(map(_neighbours, pieces)) else BUFFERED_AHEAD
        tag, peer = seq % SEQS, 1 - self._rank
        post = self._group.recv if receiving else self._group.send
        under_way: list[tuple[Any, torch.Tensor]] = []
        try:
            for place in range(len(pieces) + ahead):
                if place >= ahead and place - ahead < len(pieces):
                    work, tensor = under_way.pop(0)
                    self._wait(work, deadline)
                    if receiving:
                        self._land(arena, pieces[place - ahead], tensor)
                        arrived(place - ahead)
                if place < len(pieces):
                    tensor = self._tensor(arena, pieces[place], place % ahead, receiving)
                    under_way.append((post([tensor], peer, tag), tensor))
        except RuntimeError as error:
            raise GroupError(_brief(error)) from None

    def _wait(self, work: Any, deadline: float) -> None:
        if self._aborted:
            raise GroupError("the transfer was given up")
        work.wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))

    def _tensor(self, arena: Blocks, blocks: list[int], slot: int, receiving: bool) -> torch.Tensor:
        """The piece as one tensor: the arena itself where the blocks are neighbours, else a buffer. For nccl on the GPU."""
        size = len(blocks) * arena.shape[1]
        if receiving and self._backend.device is not None:
            return torch.empty(size, dtype=torch.uint8, device=self._backend.device)
        if _neighbours(blocks):
            tensor = torch.from_numpy(arena[blocks[0] : blocks[0] + len(blocks)].reshape(-1))
        else:
            tensor = self._buffer(slot, size)
            if not receiving:
                np.take(arena, blocks, axis=0, out=tensor.numpy().reshape(len(blocks), -1), mode="clip")
        return tensor if self._backend.device is None else tensor.to(self._backend.device)

    def _land(self, arena: Blocks, blocks: list[int], tensor: torch.Tensor) -> None:
        if self._backend.device is None and _neighbours(blocks):
            return
        whole = tensor.cpu().numpy().reshape(len(blocks), -1)
        for first, _, start, count in coalesce(blocks, blocks, len(blocks)):
            np.copyto(arena[start : start + count], whole[first : first + count])

    def _buffer(self, slot: int, size: int) -> torch.Tensor:
        kept = self._buffers.get(slot)
        if kept is None or kept.numel() < size:
            kept = self._buffers[slot] = torch.empty(size, dtype=torch.uint8)
        return kept[:size]


def _neighbours(blocks: list[int]) -> bool:
    return blocks[-1] - blocks[0] == len(blocks) - 1 and blocks == list(range(blocks[0], blocks[0] + len(blocks)))


def _brief(error: Exception) -> str:
    """Without gloo's source lines and advice."""
    return str(error).partition("] ")[2].partition(". This is")[0] or str(error)
