"""Builds a worker's share of the KV plane from its configuration. The one place that knows transports by name."""

from __future__ import annotations

from core.blocks import KvLayout
from core.clock import Clock
from core.config import TransferConfig
from kvtransfer.arena import Arena, Blocks, HostArena
from kvtransfer.channels import Channels
from kvtransfer.codec_chooser import CodecChooser
from kvtransfer.codecs import Codecs
from kvtransfer.collective_end import CollectiveEnd
from kvtransfer.copier import Copier
from kvtransfer.exports import Exports
from kvtransfer.fetch import Fetcher
from kvtransfer.grpc_transport import GrpcTransport
from kvtransfer.loopback import PROCESS_HUB, LoopbackHub, LoopbackTransport
from kvtransfer.shared_arena import SharedArena, remove_stale
from kvtransfer.shm import ShmTransport
from kvtransfer.tcp import TcpTransport
from kvtransfer.tcp_server import TcpServer
from kvtransfer.tcp_wire import load_security
from kvtransfer.transport import Transport


def open_arena(config: TransferConfig, worker_id: str, epoch: int, num_blocks: int, block_bytes: int) -> Arena:
    """Memory for a worker's blocks: shared when the transport may want that, anonymous otherwise.

    Removes what dead workers left in the shared directory first. Raises ConfigError saying what is needed and what is free.
    """
    if config.transport not in ("auto", "shm", "collective"):
        return HostArena(num_blocks, block_bytes)
    remove_stale(config.shm_dir)
    return SharedArena(config.shm_dir, worker_id, epoch, num_blocks, block_bytes)


def open_tcp(config: TransferConfig, exports: Exports, listen: str) -> TcpServer | None:
    """Serves blocks over raw sockets, when the configured transport may want that. `listen`: the worker's own HOST:PORT.

    Raises ConfigError when it cannot listen or a file it names cannot be used.
    """
    if config.transport not in ("auto", "tcp"):
        return None
    host = listen.rpartition(":")[0]
    return TcpServer(exports, config.tcp.bind or f"{host}:0", security=load_security(config.tcp), advertise=host.strip("[]"))


def offered(arena: Arena, tcp_address: str = "", *, collective: bool = False) -> tuple[str, ...]:
    """What a source with this arena supports, best first, for its tickets."""
    supported = {
        "loopback": True,
        "shm": bool(arena.path),
        "tcp": bool(tcp_address),
        "collective": collective,
        "grpc": True,
    }
    return tuple(name for name, on in supported.items() if on)


def build_transports(
    config: TransferConfig,
    dest: Blocks,
    channels: Channels,
    hub: LoopbackHub = PROCESS_HUB,
    codecs: Codecs | None = None,
    collective: CollectiveEnd | None = None,
) -> dict[str, Transport]:
    """Everything this end can pull by, into `dest`, by name. Without `codecs` raw alone."""
    copier = Copier(dest, digest=config.digest, timeout_s=config.pull_timeout_s)
    transports: dict[str, Transport] = {
        "loopback": LoopbackTransport(copier, hub),
        "shm": ShmTransport(copier, config.shm_dir),
        "tcp": TcpTransport(
            dest,
            digest=config.digest,
            timeout_s=config.pull_timeout_s,
            connections=config.tcp.connections,
            security=load_security(config.tcp),
            codecs=codecs,
        ),
        "grpc": GrpcTransport(dest, channels, digest=config.digest, timeout_s=config.pull_timeout_s, codecs=codecs),
    }
    if collective is not None:
        transports["collective"] = collective.transport(channels)
    return transports


def build_fetcher(
    config: TransferConfig,
    dest: Blocks,
    layout: KvLayout,
    channels: Channels,
    clock: Clock,
    host_id: str,
    hub: LoopbackHub = PROCESS_HUB,
    collective: CollectiveEnd | None = None,
) -> Fetcher:
    """All that pulls into `dest`, transports and codecs included. Whoever has it closes it, then the channels.

    `collective`: from `open_collective`, for the arena whose blocks `dest` are; its owner closes it after the fetcher.
    """
    codecs = Codecs(layout)
    transports = build_transports(config, dest, channels, hub, codecs, collective)
    return Fetcher(transports, config.transport, clock, host_id=host_id, codecs=CodecChooser(config.codec, codecs, dest))
