"""One worker's compute and memory, built from its configuration: model, arena, block table, executor."""

from __future__ import annotations

from collections.abc import Callable, MutableSequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from core.blocks import BlockKey, KvLayout, blocks_for, root_key
from core.clock import SystemClock
from core.errors import ConfigError
from core.hostspec import HostSpec
from core.inventory import Inventory
from core.report import ModelFacts
from engine.load import LoadedModel, load_model
from engine.step import Executor
from engine.torch_executor import TorchExecutor
from kvtransfer.arena import Arena
from kvtransfer.plane import open_arena

Progress = Callable[[float, str], None]
"""Share of starting that is done (0 to 1), and what is being done. May be called from any thread."""
BLOCKS_MIN = 2


@dataclass(frozen=True, slots=True)
class Node:
    """What the engine thread works on. `close` after it has ended."""

    model: LoadedModel
    layout: KvLayout
    arena: Arena
    inventory: Inventory
    executor: Executor
    facts: ModelFacts

    def root_key(self, cache_salt: bytes, codec: str = "") -> BlockKey:
        """`codec`: the lossy one that some of the KV has gone through."""
        return root_key(self.layout.fingerprint, cache_salt, codec)

    def close(self) -> None:
        """Removes the shared-memory file; the memory goes with its last view."""
        self.arena.close()


def build_node(spec: HostSpec, progress: Progress) -> Node:
    """Loads the model and takes the memory for its KV. Blocks for seconds: run it in a thread.

    Raises ConfigError for a model that cannot be served or memory that cannot be had.
    """
    config = spec.config
    torch.set_num_threads(config.engine.threads)  # before loading: what is measured there depends on it
    progress(0.0, f"loading {config.model.path}")
    model = load_model(
        config.model.path,
        config.model.dtype,
        config.model.max_model_len,
        lambda done, total: progress(0.9 * done / max(total, 1), f"loading {config.model.path}"),
        block_size=config.engine.block_size,
    )
    layout = model.layout
    num_blocks = config.engine.kv_bytes // layout.block_bytes
    if num_blocks < BLOCKS_MIN:
        raise ConfigError(
            f"engine.kv_bytes ({config.engine.kv_bytes} bytes) holds {num_blocks} KV blocks of {layout.block_bytes} bytes; "
            f"raise it to at least {BLOCKS_MIN * layout.block_bytes}, or lower engine.block_size"
        )
    progress(0.9, f"taking memory for {num_blocks} KV blocks")
    arena = open_arena(config.transfer, spec.worker_id, spec.epoch, num_blocks, layout.block_bytes)
    try:
        inventory = Inventory(
            num_blocks,
            cast(MutableSequence[int], arena.generation_words()),
            policy=config.engine.eviction,
            tenant_share=config.engine.tenant_share,
            pinned_max=pinnable(num_blocks, config.store.pinned_share, blocks_for(model.max_model_len, layout.block_size)),
            clock=SystemClock().now,
        )
        executor = TorchExecutor(model, model.kv_tensor(torch.from_numpy(arena.bytes_view())))
    except BaseException:
        arena.close()
        raise
    name = config.model.name or Path(config.model.path).name
    facts = ModelFacts(name, model.max_model_len, model.spec.vocab_size, config.model.path)
    return Node(model, layout, arena, inventory, executor, facts)


def pinnable(num_blocks: int, share: float, longest_blocks: int) -> int:
    """Blocks of a worker that may be pinned: never those that its longest request needs, which would wait for ever."""
    return max(0, min(int(num_blocks * share), num_blocks - longest_blocks - 1))
