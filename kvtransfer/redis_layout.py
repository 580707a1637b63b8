"""How the directory lies in Redis: keys, and records of ten bytes. The scripts are in redis_scripts.py.

A block key's shard, bucket and tag are cut from its bits. A bucket is one Redis string of records, ten bytes each:
[tag 6][node number * 2 + tier, big-endian 4]. So `MGET` of 2,048 buckets answers a lookup in one native command (a script
that looks keys up one by one takes several times as long), and at ten million entries a record costs about fifteen bytes in
all, where a field of a large hash takes eighty.

A node number is one incarnation as one shard knows it: given at its first join, never used again. A node that died or left
just loses its number, which makes every record of it meaningless at once; a script cuts those out later, some buckets at a
time. Every shard is complete in itself, with its own numbers, so that each shard of a Redis Cluster may restart on its own.

    PREFIX{s}xyz        bucket, by three bytes
    PREFIX{s}live       sorted set: number → when its time ends, in milliseconds of Redis' clock
    PREFIX{s}record     hash: number → NodeRecord
    PREFIX{s}owner      hash: number → worker id
    PREFIX{s}node:ID    hash: epoch, number, address, announced (how many announcements were taken)
    PREFIX{s}dead       hash: number → buckets not yet swept of it
    PREFIX{s}number, PREFIX{s}cursor   the last number given, the next bucket to sweep
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from core.blocks import KEY_BYTES
from kvtransfer.directory import Tier

BUCKETS = 1 << 19
"""Over all shards."""
CLUSTER_SHARDS = 16
"""Over which a Redis Cluster spreads; one server needs one."""
TAG_BYTES = 6
WORD_BYTES = 4
RECORD_BYTES = TAG_BYTES + WORD_BYTES
BUCKET_BYTES = 3
SWEEP_BUCKETS = 128
"""Swept by one call, in about a millisecond."""
_SHARD_BYTE = KEY_BYTES - 1


_Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class Lookup:
    """Keys of one shard: key `places[i]` of those asked for is in bucket `names()[i]` under `tags[i]`."""

    def __init__(self, places: list[int], names: _Bytes, tags: list[bytes]) -> None:
        self.places = places
        self.tags = tags
        self._names = names

    def names(self) -> list[bytes]:
        return _rows(self._names)

    def command(self) -> bytes:
        """`MGET` of the names as it goes over the wire. Names have one length, so that is one copy of a pattern: encoding
        2,048 arguments one by one takes longer than Redis takes to answer."""
        count, length = self._names.shape
        head = np.frombuffer(b"$%d\r\n" % length, np.uint8)
        wire = np.empty((count, len(head) + length + 2), np.uint8)
        wire[:, : len(head)] = head
        wire[:, len(head) : -2] = self._names
        wire[:, -2:] = np.frombuffer(b"\r\n", np.uint8)
        return b"*%d\r\n$4\r\nMGET\r\n" % (count + 1) + wire.tobytes()


class Layout:
    """`shards` is a power of two."""

    def __init__(self, prefix: str, shards: int) -> None:
        assert shards & (shards - 1) == 0, "shards is a power of two"
        self.shards = shards
        self.buckets = BUCKETS // shards
        self.prefixes = [f"{prefix}{{{shard}}}".encode() for shard in range(shards)]
        mask = self.buckets - 1
        self._mask = np.array([mask & 255, mask >> 8 & 255, mask >> 16], np.uint8)

    def lookup(self, keys: bytes) -> dict[int, Lookup]:
        """By shard, what is to be read for `keys` (16 bytes each, one after another)."""
        found = {}
        for shard, (places, rows) in self._split(keys).items():
            prefix = np.frombuffer(self.prefixes[shard], np.uint8)
            names = np.empty((len(rows), len(prefix) + BUCKET_BYTES), np.uint8)
            names[:, : len(prefix)] = prefix
            names[:, len(prefix) :] = rows[:, :BUCKET_BYTES] & self._mask
            found[shard] = Lookup(places, names, _rows(rows[:, BUCKET_BYTES : BUCKET_BYTES + TAG_BYTES]))
        return found

    def packed(self, keys: bytes) -> dict[int, bytes]:
        """By shard, bucket and tag of each key, nine bytes, as the scripts take them."""
        found = {}
        for shard, (_, rows) in self._split(keys).items():
            cut = rows[:, : BUCKET_BYTES + TAG_BYTES].copy()
            cut[:, :BUCKET_BYTES] &= self._mask
            found[shard] = cut.tobytes()
        return found

    def _split(self, keys: bytes) -> dict[int, tuple[list[int], _Bytes]]:
        rows = np.frombuffer(keys, np.uint8).reshape(-1, KEY_BYTES)
        if self.shards == 1 or not len(rows):
            return {0: (list(range(len(rows))), rows)} if len(rows) else {}
        shard_of = rows[:, _SHARD_BYTE] & np.uint8(self.shards - 1)
        places = {int(shard): np.flatnonzero(shard_of == shard) for shard in np.unique(shard_of)}
        return {shard: (at.tolist(), rows[at]) for shard, at in places.items()}


def words_in(bucket: bytes, tag: bytes) -> bytes:
    """The words of all records of `tag`, one after another."""
    words = b""
    at = bucket.find(tag)
    while at >= 0:
        if at % RECORD_BYTES == 0:
            words += bucket[at + TAG_BYTES : at + RECORD_BYTES]
            at = bucket.find(tag, at + RECORD_BYTES)
        else:
            at = bucket.find(tag, at + 1)
    return words


def read_words(words: bytes) -> list[tuple[int, Tier]]:
    """(node number, tier) of each word."""
    return [(word >> 1, Tier(word & 1)) for (word,) in struct.iter_unpack(">I", words)]


def _rows(table: _Bytes) -> list[bytes]:
    found: list[bytes] = np.ascontiguousarray(table).view(f"V{table.shape[1]}").ravel().tolist()
    return found
