"""One worker's end of the collective transport: the helper process, what it serves to others and what pulls through it."""

from __future__ import annotations

from core.config import TransferConfig
from core.errors import ConfigError
from core.service import Registration
from kvtransfer.arena import Arena
from kvtransfer.channels import Channels
from kvtransfer.collective import CollectiveTransport
from kvtransfer.collective_helper import Helper
from kvtransfer.collective_service import CollectiveServicer
from kvtransfer.exports import Exports
from kvtransfer.shared_arena import SharedArena
from tandem.v1.kv_pb2_grpc import add_KvCollectiveServicer_to_server


class CollectiveEnd:
    """Close it after the transport and the server that use it, before the arena."""

    def __init__(self, config: TransferConfig, arena: SharedArena, host: str) -> None:
        self._config = config
        self._arena = arena
        self.helper = Helper(config.collective, host, config.shm_dir)

    def registration(self, exports: Exports) -> Registration:
        servicer = CollectiveServicer(exports, self.helper)
        return Registration("tandem.v1.KvCollective", add_KvCollectiveServicer_to_server, servicer)

    def transport(self, channels: Channels) -> CollectiveTransport:
        config = self._config
        return CollectiveTransport(self._arena, channels, self.helper, digest=config.digest, timeout_s=config.pull_timeout_s)

    async def close(self) -> None:
        """Ends the helper process. Idempotent."""
        await self.helper.close()


def open_collective(config: TransferConfig, arena: Arena, listen: str) -> CollectiveEnd | None:
    """Starts the helper process, when the configured transport is this one. `listen`: the worker's own HOST:PORT.

    Raises ConfigError for an address that others cannot reach, and for nccl without a GPU.
    """
    if config.transport != "collective":
        return None
    assert isinstance(arena, SharedArena), "the helper process maps it"
    host = listen.rpartition(":")[0].strip("[]")
    if host in ("", "0.0.0.0", "::"):
        raise ConfigError(
            "transfer.transport: collective needs the address that other workers reach this one at; listen there,"
            f" not at {listen}"
        )
    if config.collective == "nccl":
        _check_nccl()
    return CollectiveEnd(config, arena, host)


def _check_nccl() -> None:
    import torch.distributed  # here alone: a node that does not ask for nccl does without torch

    if not torch.cuda.is_available() or not torch.distributed.is_nccl_available():
        raise ConfigError("transfer.collective: nccl needs a GPU and a torch built for it; set gloo, or auto to let it choose")
