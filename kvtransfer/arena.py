"""Memory for KV blocks, cut into equal spans, each with a generation word that changes when the block is handed out again.

An arena knows nothing of who uses a block; that is the inventory's table. The engine wraps `bytes_view()` in tensors,
transports copy from it and into it.
"""

from __future__ import annotations

import mmap
import os
import socket
from abc import ABC, abstractmethod
from hashlib import sha256
from pathlib import Path

import numpy as np
import numpy.typing as npt

from core.config import TransferConfig
from core.errors import ConfigError

Blocks = npt.NDArray[np.uint8]  # [num_blocks, block_bytes]
Generations = npt.NDArray[np.uint64]  # [num_blocks]


class Arena(ABC):
    """`num_blocks` spans of `block_bytes` bytes, mapped and faulted in for as long as the arena is open."""

    path: str = ""
    """The file other processes of this host can map; empty when there is none."""

    def __init__(self, blocks: Blocks, generations: Generations) -> None:
        self._blocks = blocks
        self._generations = generations

    def bytes_view(self) -> Blocks:
        """uint8 [num_blocks, block_bytes], the memory itself."""
        return self._blocks

    @property
    def generations(self) -> Generations:
        """uint64 [num_blocks], the memory itself. Only the inventory writes it."""
        return self._generations

    def generation_words(self) -> memoryview[int]:
        """The same words as `generations`, as a sequence of plain ints: what `Inventory` takes."""
        return self._generations.data

    @property
    def num_blocks(self) -> int:
        return int(self._blocks.shape[0])

    @property
    def block_bytes(self) -> int:
        return int(self._blocks.shape[1])

    @abstractmethod
    def close(self) -> None:
        """Gives the memory back once nobody views it any more; removes the file at once. Idempotent."""


class HostArena(Arena):
    """Anonymous memory of this process, on huge pages where the kernel gives them."""

    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        check_shape(num_blocks, block_bytes)
        try:
            memory = mmap.mmap(-1, num_blocks * block_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise ConfigError(
                f"cannot map {num_blocks * block_bytes} bytes for KV blocks ({error.strerror}); lower engine.kv_bytes"
            ) from None
        if hasattr(mmap, "MADV_HUGEPAGE"):
            _try_huge_pages(memory)
        blocks: Blocks = np.frombuffer(memory, dtype=np.uint8).reshape(num_blocks, block_bytes)
        blocks.fill(0)  # fault every page in now, not inside the first requests
        super().__init__(blocks, np.zeros(num_blocks, dtype=np.uint64))

    def close(self) -> None:
        """Nothing to remove: the last view that goes takes the memory with it."""


def check_shape(num_blocks: int, block_bytes: int) -> None:
    if num_blocks < 1 or block_bytes < 1:
        raise ConfigError(
            f"an arena of {num_blocks} blocks of {block_bytes} bytes holds nothing; raise engine.kv_bytes to at least one block"
        )


def host_id(shm_dir: str = TransferConfig().shm_dir) -> str:
    """Equal for two processes exactly when each can map the other's files under `shm_dir`.

    The kernel's boot id tells machines apart; the device number of the mounted file system tells apart containers of one
    machine that each have their own /dev/shm.
    """
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        machine = socket.gethostname()
    try:
        device = os.stat(shm_dir).st_dev
    except OSError:
        device = -1
    return sha256(f"{machine} {device} {shm_dir}".encode()).hexdigest()[:16]


def _try_huge_pages(memory: mmap.mmap) -> None:
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them: ordinary pages do
        return
