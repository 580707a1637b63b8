"""Blocks of KV: their keys, their layout in memory, and the ticket that opens a hand-off."""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

from core.request import AttemptKey

BlockKey = bytes  # 16 bytes
KEY_BYTES = 16
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


def root_key(fingerprint: bytes, cache_salt: bytes = b"", codec: str = "") -> BlockKey:
    """The parent of a prompt's first block: the salt that separates models, tenants and lossy codecs."""
    parts = (fingerprint, cache_salt, codec.encode())
    framed = b"".join(struct.pack("<I", len(part)) + part for part in parts)
    return sha256(b"tandem-block-root" + framed).digest()[:KEY_BYTES]


def block_keys(root: BlockKey, token_ids: Sequence[int], block_size: int, parent_blocks: int = 0) -> list[BlockKey]:
    """Chained keys of the full blocks of `token_ids`: first 128 bits of SHA-256 over (parent key, token ids).

    Cryptographic, because a collision would hand one tenant another's cache. `root` is the key of the block before
    `token_ids[parent_blocks * block_size]`, so a caller that already knows a prefix passes its last key.
    Raises OverflowError for ids that are not 32 bits wide, TypeError for what is no whole number.
    """
    first, last = parent_blocks * block_size, len(token_ids) // block_size * block_size
    if first >= last:
        return []
    packed = array("I", token_ids[first:last])  # all at once: block by block it takes three times as long
    if sys.byteorder == "big":
        packed.byteswap()
    parent = root
    blocks = struct.iter_unpack(f"{block_size * packed.itemsize}s", packed)
    return [parent := sha256(parent + block).digest()[:KEY_BYTES] for (block,) in blocks]


def blocks_for(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)


@dataclass(frozen=True, slots=True)
class KvLayout:
    """One block is one contiguous span `[layer][k|v][kv_heads][block_size][head_dim]`.

    The fingerprint names weights, dtype and rope. Two ends exchange raw blocks only when their layouts are equal.
    """

    fingerprint: bytes
    dtype: str
    num_layers: int
    kv_heads: int
    head_dim: int
    block_size: int

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Shape of one block: (layers, 2, kv_heads, block_size, head_dim)."""
        return (self.num_layers, 2, self.kv_heads, self.block_size, self.head_dim)

    @property
    def token_bytes(self) -> int:
        return self.num_layers * 2 * self.kv_heads * self.head_dim * _DTYPE_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        return self.token_bytes * self.block_size

    def mismatch(self, other: KvLayout) -> str | None:
        """Why raw blocks cannot pass between the two layouts, named for the operator; None when they can."""
        for name in ("fingerprint", "dtype", "num_layers", "kv_heads", "head_dim", "block_size"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                show = (lambda v: v.hex()) if isinstance(mine, bytes) else str
                return f"{name} differs: {show(mine)} here, {show(theirs)} there"
        return None


@dataclass(frozen=True, slots=True)
class KvSource:
    """Where a worker's blocks can be read from."""

    worker_id: str
    epoch: int
    grpc_address: str
    host_id: str = ""
    arena_path: str = ""
    num_blocks: int = 0
    transports: tuple[str, ...] = ()
    tcp_address: str = ""


@dataclass(frozen=True, slots=True)
class KvTicket:
    """The one value that opens a hand-off. `lease_s` is a length; the puller shortens it by a margin on its own clock."""

    key: AttemptKey
    layout: KvLayout
    source: KvSource
    lease_s: float
    codec: str = "raw"


@dataclass(frozen=True, slots=True)
class BlockRecord:
    """One announced block. The unfinished last block of a request has a place (`index`), never a key."""

    index: int
    key: BlockKey  # empty for the unfinished last block
    block_id: int
    generation: int
    digest: int  # xxh3-64 of the bytes, 0 when digests are off
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Closing:
    """Ends a hand-off's announcements: the KV of `num_tokens` tokens exists; `generated` was sampled after them."""

    num_tokens: int
    generated: tuple[int, ...]
    finished: bool
    prefill_s: float = 0.0
