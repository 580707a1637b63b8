"""How the directory lies in Redis: keys, and records of ten bytes. The scripts are in redis_scripts.py.

A block key's shard, bucket and tag are cut from its bits. A bucket is one field of a hash, records of ten bytes each:
[tag 6][node number * 2 + tier, big-endian 4]. So `HMGET` of 2,048 buckets answers a lookup in one native command (a script
that looks keys up one by one takes several times as long, and `MGET` of as many strings a third longer), and at ten million
entries a record costs about fifty bytes in all, where a field of its own takes eighty.

A node number is one incarnation as one shard knows it: given at its first join, never used again. A node that died or left
just loses its number, which makes every record of it meaningless at once; a script cuts those out later, some buckets at a
time. Every shard is complete in itself, with its own numbers, so that each shard of a Redis Cluster may restart on its own.

    PREFIX{s}entries    hash: bucket, by three bytes → records; announced:NUMBER → how many announcements were taken, lost when
                        they are; about → nothing of interest, but so long that Redis never keeps this hash as a list
    PREFIX{s}live       sorted set: number → when its time ends, in milliseconds of Redis' clock
    PREFIX{s}record     hash: number → NodeRecord
    PREFIX{s}owner      hash: number → worker id
    PREFIX{s}node:ID    hash: epoch, number, address
    PREFIX{s}dead       hash: number → buckets not yet swept of it
    PREFIX{s}number, PREFIX{s}cursor   the last number given, the next bucket to sweep
    PREFIX{s}longest    the longest time to live of any join, in milliseconds
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from core.blocks import KEY_BYTES
from kvtransfer.directory import Tier

BUCKETS = 1 << 23
"""Over all shards: so many that ten million entries are little more than one to a bucket, and looked up and announced at more
than half the speed of ten thousand. A million buckets take a third of the memory then, and a third longer."""
CLUSTER_SHARDS = 16
"""Over which a Redis Cluster spreads; one server needs one."""
TAG_BYTES = 6
WORD_BYTES = 4
RECORD_BYTES = TAG_BYTES + WORD_BYTES
BUCKET_BYTES = 3
COMMAND_BUCKETS = 256
"""Asked for by one command, so that the first answers are read while Redis is busy with the next: it reads 16 KiB at a time,
does the commands that are whole, and answers before it reads on."""
SWEEP_BUCKETS = 512
"""Swept by one call, in two milliseconds at most."""
_SHARD_BYTE = KEY_BYTES - 1

WordRun = tuple[bytes, int]
"""Words, of how many keys in a row."""
_Bytes = np.ndarray[Any, np.dtype[np.uint8]]
_Counts = np.ndarray[Any, np.dtype[np.int64]]


class Buckets:
    """Of a lookup, as they arrive, portion by portion; nothing after the first that does not exist."""

    def __init__(self) -> None:
        self._lengths: list[_Counts] = []
        self._bytes: list[bytes] = []
        self._ended = False

    def take(self, portion: list[bytes | None]) -> None:
        if self._ended:
            return
        try:
            lengths = np.fromiter(map(len, portion), np.int64, len(portion))  # type: ignore[arg-type]
        except TypeError:
            self._ended = True
            portion = portion[: portion.index(None)]
            lengths = np.fromiter(map(len, portion), np.int64, len(portion))  # type: ignore[arg-type]
        self._lengths.append(lengths)
        self._bytes.append(b"".join(portion))  # type: ignore[arg-type]

    def joined(self) -> tuple[bytes, _Counts]:
        """All one after another, and how long each is."""
        return b"".join(self._bytes), np.concatenate(self._lengths) if self._lengths else np.zeros(0, np.int64)


class Lookup:
    """Keys of one shard: key `places[i]` of those asked for is in the i-th bucket, under the i-th tag."""

    def __init__(self, places: Sequence[int], name: bytes, buckets: _Bytes, tags: _Bytes) -> None:
        """`name`: of the hash that has the buckets."""
        self.places = places
        self._name = name
        self._buckets = buckets
        self._tags = tags

    def buckets(self) -> list[bytes]:
        return _rows(self._buckets)

    def tags(self) -> list[bytes]:
        return _rows(self._tags)

    def commands(self) -> list[bytes]:
        """`HMGET` of the buckets as it goes over the wire, some of them in each. Bucket names have one length, so that is one
        copy of a pattern: encoding 2,048 arguments one by one takes longer than Redis takes to answer."""
        wire = np.empty((len(self._buckets), 4 + BUCKET_BYTES + 2), np.uint8)
        wire[:, :4] = np.frombuffer(b"$%d\r\n" % BUCKET_BYTES, np.uint8)
        wire[:, 4:-2] = self._buckets
        wire[:, -2:] = np.frombuffer(b"\r\n", np.uint8)
        name = b"$5\r\nHMGET\r\n$%d\r\n%s\r\n" % (len(self._name), self._name)
        parts = [wire[first : first + COMMAND_BUCKETS] for first in range(0, len(wire), COMMAND_BUCKETS)]
        return [b"*%d\r\n%s%s" % (len(part) + 2, name, part.tobytes()) for part in parts]

    def read(self, buckets: Buckets) -> list[WordRun]:
        """What the buckets say of the keys until the first that nobody holds: (words, of how many keys in a row)."""
        joined, lengths = buckets.joined()
        if not len(lengths):
            return []
        counts = lengths // RECORD_BYTES
        if (counts * RECORD_BYTES != lengths).any():
            return self._read_one_by_one(joined, lengths)
        return self._read_at_once(joined, counts)

    def _read_at_once(self, buckets: bytes, counts: _Counts) -> list[WordRun]:
        """Compares all records of all buckets with the tag asked of them. `counts`: how many of them each bucket has."""
        keys = len(counts)
        records = np.frombuffer(buckets, "<u2").reshape(-1, RECORD_BYTES // 2)
        asked = np.ascontiguousarray(self._tags[:keys]).view("<u2")
        hits = np.flatnonzero(records[:, 0] == np.repeat(asked[:, 0], counts))  # nearly all others differ here already
        of = np.repeat(np.arange(keys), counts)[hits]
        equal = (records[hits, 1] == asked[of, 1]) & (records[hits, 2] == asked[of, 2])
        hits, of = hits[equal], of[equal]
        words = np.ascontiguousarray(records[hits, TAG_BYTES // 2 :]).view("<u4").ravel()
        per_key = np.bincount(of, minlength=keys)
        until = keys if per_key.all() else int(np.argmin(per_key))
        return _runs(words, per_key[:until])

    def _read_one_by_one(self, buckets: bytes, lengths: _Counts) -> list[WordRun]:
        """The same where a bucket is damaged or somebody else's."""
        runs: list[WordRun] = []
        for end, length, tag in zip(np.cumsum(lengths).tolist(), lengths.tolist(), self.tags(), strict=False):
            words = words_in(buckets[end - length : end], tag)
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
            name = self.prefixes[shard] + b"entries"
            tags = rows[:, BUCKET_BYTES : BUCKET_BYTES + TAG_BYTES]
            found[shard] = Lookup(places, name, rows[:, :BUCKET_BYTES] & self._mask, tags)
        return found

    def packed(self, keys: bytes) -> dict[int, bytes]:
        """By shard, bucket and tag of each key, nine bytes, as the scripts take them."""
        found = {}
        for shard, (_, rows) in self._split(keys).items():
            cut = rows[:, : BUCKET_BYTES + TAG_BYTES].copy()
            cut[:, :BUCKET_BYTES] &= self._mask
            found[shard] = cut.tobytes()
        return found

    def _split(self, keys: bytes) -> dict[int, tuple[Sequence[int], _Bytes]]:
        rows = np.frombuffer(keys, np.uint8).reshape(-1, KEY_BYTES)
        if self.shards == 1 or not len(rows):
            return {0: (range(len(rows)), rows)} if len(rows) else {}
        shard_of = rows[:, _SHARD_BYTE] & np.uint8(self.shards - 1)
        places = {int(shard): np.flatnonzero(shard_of == shard) for shard in np.unique(shard_of)}
        return {shard: (at.tolist(), rows[at]) for shard, at in places.items()}


def _runs(words: np.ndarray[Any, np.dtype[np.uint32]], per_key: _Counts) -> list[WordRun]:
    """Keys in a row with equal words; `per_key[i]` of `words` belong to key i, those of each key one after another."""
    keys = len(per_key)
    if not keys:
        return []
    starts = np.cumsum(per_key) - per_key
    words = words[: int(per_key.sum())]
    if len(words) == keys:  # one each, as nearly always
        like_next = words[1:] == words[:-1]
    else:
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
