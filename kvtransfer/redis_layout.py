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
    PREFIX{s}longest    the longest time to live of any join, in milliseconds
"""

from __future__ import annotations

import struct
from itertools import pairwise
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
    """Keys of one shard: key `places[i]` of those asked for is in the i-th bucket, under the i-th tag."""

    def __init__(self, places: list[int], names: _Bytes, tags: _Bytes) -> None:
        self.places = places
        self._names = names
        self._tags = tags

    def names(self) -> list[bytes]:
        return _rows(self._names)

    def tags(self) -> list[bytes]:
        return _rows(self._tags)

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

    def read(self, buckets: list[bytes | None]) -> list[tuple[bytes, int]]:
        """What the buckets say of the keys until the first that nobody holds: (words, of how many keys in a row)."""
        held = buckets[: buckets.index(None)] if None in buckets else buckets
        if not held:
            return []
        if any(len(bucket) % RECORD_BYTES for bucket in held):  # type: ignore[arg-type]
            return self._read_one_by_one(held)  # type: ignore[arg-type]
        return self._read_at_once(held)  # type: ignore[arg-type]

    def _read_at_once(self, buckets: list[bytes]) -> list[tuple[bytes, int]]:
        """Compares all records of all buckets with the tag asked of them."""
        count = len(buckets)
        lengths = np.fromiter(map(len, buckets), np.int64, count)
        records = np.frombuffer(b"".join(buckets), np.uint8).reshape(-1, RECORD_BYTES)
        bucket_of = np.repeat(np.arange(count), lengths // RECORD_BYTES)
        tags, asked = records.view("<u2")[:, :3], np.ascontiguousarray(self._tags[:count]).view("<u2")[bucket_of]
        hits = np.flatnonzero((tags[:, 0] == asked[:, 0]) & (tags[:, 1] == asked[:, 1]) & (tags[:, 2] == asked[:, 2]))
        per_key = np.bincount(bucket_of[hits], minlength=count)
        until = count if per_key.all() else int(np.argmin(per_key))
        return _runs(np.ascontiguousarray(records[:, TAG_BYTES:]).view("<u4").ravel()[hits], per_key[:until])

    def _read_one_by_one(self, buckets: list[bytes]) -> list[tuple[bytes, int]]:
        """The same where a bucket is damaged or somebody else's."""
        runs: list[tuple[bytes, int]] = []
        for bucket, tag in zip(buckets, self.tags(), strict=False):
            words = words_in(bucket, tag)
            if not words:
                break
            if runs and runs[-1][0] == words:
                runs[-1] = (words, runs[-1][1] + 1)
            else:
                runs.append((words, 1))
        return runs


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
            found[shard] = Lookup(places, names, rows[:, BUCKET_BYTES : BUCKET_BYTES + TAG_BYTES])
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


def _runs(words: np.ndarray[Any, np.dtype[np.uint32]], per_key: np.ndarray[Any, np.dtype[np.int64]]) -> list[tuple[bytes, int]]:
    """Keys in a row with equal words; `per_key[i]` of `words` belong to key i, those of each key one after another."""
    keys = len(per_key)
    if not keys:
        return []
    starts = np.cumsum(per_key) - per_key
    words = words[: int(per_key.sum())]
    ahead = np.arange(len(words)) + np.repeat(per_key, per_key)  # the same word of the next key, if that has as many
    equal = words == words[np.minimum(ahead, len(words) - 1)]
    like_next = np.logical_and.reduceat(equal, starts)[:-1] & (per_key[:-1] == per_key[1:])
    edges = [0, *(np.flatnonzero(~like_next) + 1).tolist(), keys]
    return [(words[starts[first] : starts[first] + per_key[first]].tobytes(), last - first) for first, last in pairwise(edges)]


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
