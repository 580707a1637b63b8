"""All that a store node has once it knows the layout of its blocks: memory, table, disk, and ways in and out."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, MutableSequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from core.blocks import KvLayout, KvSource
from core.clock import Clock
from core.config import Config
from core.errors import ConfigError
from core.hostspec import HostSpec
from core.inventory import Inventory
from core.request import WorkerRole
from kvtransfer.arena import Arena
from kvtransfer.channels import Channels
from kvtransfer.exports import Exports
from kvtransfer.fetch import Fetcher
from kvtransfer.kv_node import KvNode
from kvtransfer.loopback import PROCESS_HUB
from kvtransfer.plane import build_fetcher, offered, open_arena, open_tcp
from kvtransfer.shared_arena import remove_stale
from kvtransfer.store_disk import StoreDisk

BLOCKS_MIN = 2


@dataclass(frozen=True, slots=True)
class StorePlane:
    """Open it with `open_plane`; `close` gives everything back, the file in shared memory first of all."""

    layout: KvLayout
    arena: Arena
    inventory: Inventory
    exports: Exports
    fetcher: Fetcher
    disk: StoreDisk
    node: KvNode
    stack: AsyncExitStack

    async def close(self) -> None:
        await self.stack.aclose()


def disk_directory(spec: HostSpec) -> Path:
    """Each store node has its own below `store.disk_dir`: a directory belongs to one process."""
    return Path(spec.config.store.disk_dir).expanduser() / spec.worker_id


def check_room(config: Config) -> None:
    """Before anything is stored: raises ConfigError, saying what is free, when shared memory cannot hold the store's part."""
    if config.transfer.transport not in ("auto", "shm", "collective"):
        return
    directory, needed = config.transfer.shm_dir, int(config.store.dram_bytes)
    remove_stale(directory)
    try:
        found = os.statvfs(directory)
    except OSError as error:
        raise ConfigError(
            f"transfer.shm_dir: {directory} cannot be used ({error.strerror}); set it to a writable memory file system,"
            " or transfer.transport to grpc to do without"
        ) from None
    free = found.f_bavail * found.f_frsize
    if needed > free:
        raise ConfigError(
            f"store.dram_bytes asks for {needed} bytes and {directory} has {free} free; lower it, enlarge that file system"
            " (docker: --shm-size), point transfer.shm_dir elsewhere, or set transfer.transport to grpc to do without it"
        )


async def open_plane(
    spec: HostSpec, layout: KvLayout, clock: Clock, host_id: str, grpc_address: Callable[[], str]
) -> StorePlane:
    """Takes the memory and opens the disk. Raises ConfigError when memory cannot be had; a disk that cannot is done without."""
    config = spec.config
    num_blocks = int(config.store.dram_bytes) // layout.block_bytes
    if num_blocks < BLOCKS_MIN:
        raise ConfigError(
            f"store.dram_bytes ({int(config.store.dram_bytes)} bytes) holds {num_blocks} KV blocks of {layout.block_bytes}"
            f" bytes; raise it to at least {BLOCKS_MIN * layout.block_bytes}"
        )
    check_room(config)
    async with AsyncExitStack() as stack:
        arena = await asyncio.to_thread(open_arena, config.transfer, spec.worker_id, spec.epoch, num_blocks, layout.block_bytes)
        stack.callback(arena.close)
        inventory = Inventory(
            num_blocks,
            cast(MutableSequence[int], arena.generation_words()),
            policy=config.store.policy,
            tenant_share=config.store.tenant_share,
            pinned_max=int(num_blocks * config.store.pinned_share),
            clock=clock.now,
        )
        disk = await StoreDisk.open(config.store, disk_directory(spec), layout, arena, inventory)
        stack.push_async_callback(disk.close)
        exports = Exports(spec.epoch, arena, inventory, clock, digest=config.transfer.digest, layout=layout)
        stack.push_async_callback(exports.close)
        fetcher = _fetcher(config, layout, arena, clock, host_id, stack)
        source = _reachable(spec, arena, exports, host_id, grpc_address, stack)
        node = KvNode(exports, inventory, layout, source, WorkerRole.STORE, config.store.policy)
        disk.spoiled = lambda key: node.condemn([key])
        return StorePlane(layout, arena, inventory, exports, fetcher, disk, node, stack.pop_all())


def _fetcher(config: Config, layout: KvLayout, arena: Arena, clock: Clock, host_id: str, stack: AsyncExitStack) -> Fetcher:
    channels = Channels()
    stack.push_async_callback(channels.close)
    fetcher = build_fetcher(config.transfer, arena.bytes_view(), layout, channels, clock, host_id)
    stack.push_async_callback(fetcher.close)
    return fetcher


def _reachable(
    spec: HostSpec,
    arena: Arena,
    exports: Exports,
    host_id: str,
    grpc_address: Callable[[], str],
    stack: AsyncExitStack,
) -> Callable[[], KvSource]:
    """Opens the ways to our blocks, and says where they are."""
    PROCESS_HUB.register(spec.worker_id, spec.epoch, arena)
    stack.callback(PROCESS_HUB.unregister, spec.worker_id, spec.epoch)
    tcp = open_tcp(spec.config.transfer, exports, spec.listen)
    tcp_address = ""
    if tcp is not None:
        stack.push_async_callback(asyncio.to_thread, tcp.close)
        tcp_address = tcp.address
    return lambda: KvSource(
        worker_id=spec.worker_id,
        epoch=spec.epoch,
        grpc_address=grpc_address(),
        host_id=host_id,
        arena_path=arena.path,
        num_blocks=arena.num_blocks,
        transports=offered(arena, tcp_address),
        tcp_address=tcp_address,
    )
