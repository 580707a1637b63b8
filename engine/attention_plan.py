"""Which queries meet which keys in one step, as index arrays. Numpy only: built once per step, used by every layer.

Queries are cut into tiles of one sequence, keys into chunks at fixed positions of the sequence; an item is a (tile, chunk)
pair that meets. All items of about one width are one batched product, so nothing loops over sequences. A query's result
is the merge of its chunks in order, so the order of every sum follows from key positions alone, never from the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

MASKED = -1e30  # finite, so that a fully masked row stays free of NaN; exp underflows to exactly 0
MERGE_LANES = 16  # chunks are merged in multiples of this, so that the merge's own sums have one order
_WIDTH_UNIT = 16  # widths are whole vectors: no element is ever computed by a scalar tail
_WASTE_KEYS = 4096  # padding (items x keys) up to which items of unequal width share a product


class Shape(NamedTuple):
    """Of the KV memory and the heads."""

    num_heads: int
    kv_heads: int
    head_dim: int
    num_layers: int
    block_size: int


@dataclass(frozen=True, slots=True)
class Limits:
    """`rows`, `chunk`: fewest query rows and most keys of a product that are batch-invariant here (`attention_check`).

    `group_keys` bounds the keys gathered for one product.
    """

    rows: int = 8
    chunk: int = 256
    tile: int = 64
    group_keys: int = 16384


@dataclass(frozen=True, slots=True)
class Queries:
    """The packed tokens of a step, one entry per sequence: `count` tokens from row `first`, the first at position `start`.

    `tables` [sequences, blocks] names each sequence's blocks, short rows filled up with any valid block.
    """

    first: Ints
    count: Ints
    start: Ints
    tables: Ints


@dataclass(frozen=True, slots=True)
class Group:
    """One batched product: `items` pairs of `rows` query rows per kv head with `width` keys."""

    items: int
    rows: int
    width: int
    tile: int
    query_rows: Ints  # [items * kv_heads * rows] rows of heads seen as [tokens * all heads, head_dim]
    key_rows: Ints  # [2 * items * kv_heads * blocks] rows of kv seen as [blocks * layers * 2 * kv_heads, block_size * head_dim]
    bias: Floats  # [items, 1, tile, 1, width]: 0 or MASKED


@dataclass(frozen=True, slots=True)
class Merge:
    """Chunks of each output row: `rows` [lanes, N] of the joined output, `absent` [N, lanes] MASKED where there is none."""

    chunks: int
    rows: Ints
    absent: Floats


@dataclass(frozen=True, slots=True)
class Plan:
    groups: tuple[Group, ...]
    out_rows: Ints | None  # [tokens * num_heads] rows of the groups' joined output; None when they are in order already
    merge: Merge | None  # set instead of out_rows when some query has several chunks


class _Items(NamedTuple):
    """Items of one class (decode or prefill) of tiles."""

    tile: Ints
    chunk: Ints
    width: Ints
    ordinal: Ints


class Tiles(NamedTuple):
    """Runs of one sequence's queries: `length` from row `first`, the first at position `start`."""

    first: Ints
    length: Ints
    start: Ints
    sequence: Ints


def chunk_tokens(block_size: int, wanted: int) -> int:
    """Keys of a chunk: whole blocks and whole vectors, as many as fit into `wanted`."""
    unit = math.lcm(block_size, _WIDTH_UNIT)
    return max(1, wanted // unit) * unit


def plan_attention(queries: Queries, padded_tokens: int, window: int | None, shape: Shape, limits: Limits) -> Plan:
    """`padded_tokens` rows are answered; those beyond the queries' own get some finite value."""
    single = queries.count == 1
    parts: list[tuple[Tiles, int, int]] = []
    if single.any():
        rows = max(limits.rows, shape.num_heads // shape.kv_heads)
        parts.append((_one_each(queries, single), 1, rows))
    if not single.all():
        tile = _tile_size(int(queries.count.max()), shape, limits)
        parts.append((_cut(queries, ~single, tile), tile, tile * (shape.num_heads // shape.kv_heads)))
    builder = _Builder(queries, padded_tokens, window, shape, limits)
    for tiles, tile, rows in parts:
        builder.add(tiles, tile, rows)
    return builder.plan()


def _tile_size(longest: int, shape: Shape, limits: Limits) -> int:
    fewest = -(-limits.rows * shape.kv_heads // shape.num_heads)
    return max(fewest, min(limits.tile, -(-longest // 8) * 8))


def tiles_of(queries: Queries, tile: int) -> Tiles:
    """All queries, cut into runs of at most `tile`."""
    return _cut(queries, np.ones(len(queries.count), np.bool_), tile)


def _one_each(queries: Queries, chosen: NDArray[np.bool_]) -> Tiles:
    return Tiles(queries.first[chosen], queries.count[chosen], queries.start[chosen], np.flatnonzero(chosen))


def _cut(queries: Queries, chosen: NDArray[np.bool_], tile: int) -> Tiles:
    sequences = np.flatnonzero(chosen)
    pieces = -(-queries.count[chosen] // tile)
    sequence = np.repeat(sequences, pieces)
    offset = _ordinals(pieces) * tile
    return Tiles(
        queries.first[sequence] + offset,
        np.minimum(tile, queries.count[sequence] - offset),
        queries.start[sequence] + offset,
        sequence,
    )


def _ordinals(counts: Ints) -> Ints:
    """0 … n−1 for each n of `counts`, one after the other."""
    return np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)


class _Builder:
    def __init__(self, queries: Queries, padded_tokens: int, window: int | None, shape: Shape, limits: Limits) -> None:
        self._queries, self._tokens, self._window, self._shape, self._limits = queries, padded_tokens, window, shape, limits
        self._chunk = chunk_tokens(shape.block_size, limits.chunk)
        self._groups: list[Group] = []
        self._base = 0  # rows of joined output so far
        self._placed: list[tuple[Ints, Ints, Ints]] = []  # (token, ordinal of the chunk, [., num_heads] output rows)

    def add(self, tiles: Tiles, tile: int, rows: int) -> None:
        items = self._items(tiles)
        for chosen in self._split(items.width):
            self._group(tiles, items, chosen, tile, rows)

    def plan(self) -> Plan:
        token = np.concatenate([placed[0] for placed in self._placed])
        ordinal = np.concatenate([placed[1] for placed in self._placed])
        out = np.concatenate([placed[2] for placed in self._placed])
        chunks = int(ordinal.max()) + 1
        if chunks == 1:
            rows = np.zeros((self._tokens, self._shape.num_heads), np.int64)
            rows[token] = out
            flat = rows.reshape(-1)
            in_order = flat.size == self._base and bool((flat == np.arange(flat.size)).all())
            return Plan(tuple(self._groups), None if in_order else flat, None)
        lanes = -(-chunks // MERGE_LANES) * MERGE_LANES
        index = np.zeros((lanes, self._tokens, self._shape.num_heads), np.int64)
        absent = np.full((self._tokens, self._shape.num_heads, lanes), MASKED, np.float32)
        index[ordinal, token] = out
        absent[token, :, ordinal] = 0.0
        absent[int(self._queries.count.sum()) :, :, 0] = 0.0
        return Plan(tuple(self._groups), None, Merge(chunks, index.reshape(lanes, -1), absent.reshape(-1, lanes)))

    def _items(self, tiles: Tiles) -> _Items:
        end = tiles.start + tiles.length
        begin = np.zeros_like(end) if self._window is None else np.maximum(0, tiles.start - self._window + 1)
        first = begin // self._chunk
        pieces = (end - 1) // self._chunk - first + 1
        tile, ordinal = np.repeat(np.arange(len(end)), pieces), _ordinals(pieces)
        chunk = first[tile] + ordinal
        unit = math.lcm(self._shape.block_size, _WIDTH_UNIT)
        width = -(-np.minimum(self._chunk, end[tile] - chunk * self._chunk) // unit) * unit
        return _Items(tile, chunk, width, ordinal)

    def _split(self, width: Ints) -> list[Ints]:
        """Items that share a product: all, unless padding to the widest costs more than a second product."""
        order = np.argsort(width, kind="stable")
        parts: list[Ints] = []
        while order.size:
            widths = width[order]
            waste = np.cumsum((widths[-1] - widths)[::-1])
            keep = min(int((waste <= _WASTE_KEYS).sum()), max(1, self._limits.group_keys // int(widths[-1])))
            parts.append(np.sort(order[-keep:]))
            order = order[:-keep]
        return parts

    def _group(self, tiles: Tiles, items: _Items, chosen: Ints, tile: int, rows: int) -> None:
        shape, of = self._shape, items.tile[chosen]
        group, all_heads = shape.num_heads // shape.kv_heads, shape.num_heads + 2 * shape.kv_heads
        width, chunk = int(items.width[chosen].max()), items.chunk[chosen]
        within = np.minimum(np.arange(tile)[None, :], tiles.length[of][:, None] - 1)  # the last query again as padding
        row = np.arange(rows)
        at, head = (row // group, row % group) if tile > 1 else (np.zeros_like(row), np.minimum(row, group - 1))
        token = (tiles.first[of][:, None] + within)[:, at]
        heads = np.arange(shape.kv_heads)[:, None] * group + head[None, :]
        self._groups.append(
            Group(
                items=len(of),
                rows=rows,
                width=width,
                tile=tile,
                query_rows=(token[:, None, :] * all_heads + heads[None]).reshape(-1),
                key_rows=self._key_rows(tiles.sequence[of], chunk, width),
                bias=self._bias(tiles.start[of][:, None] + within, chunk * self._chunk, width),
            )
        )
        self._place(tiles, of, items.ordinal[chosen], rows)

    def _key_rows(self, sequence: Ints, chunk: Ints, width: int) -> Ints:
        shape, tables = self._shape, self._queries.tables
        per_chunk = self._chunk // shape.block_size
        index = chunk[:, None] * per_chunk + np.arange(width // shape.block_size)[None, :]
        blocks = tables[sequence[:, None], np.minimum(index, tables.shape[1] - 1)]
        planes = np.arange(2 * shape.kv_heads).reshape(2, 1, shape.kv_heads, 1)
        rows: Ints = (blocks * (shape.num_layers * 2 * shape.kv_heads))[None, :, None, :] + planes
        return rows.reshape(-1)

    def _bias(self, positions: Ints, chunk_start: Ints, width: int) -> Floats:
        keys = (chunk_start[:, None] + np.arange(width))[:, None, :]
        seen = keys <= positions[:, :, None]
        if self._window is not None:
            seen &= keys > positions[:, :, None] - self._window
        return np.where(seen, np.float32(0.0), np.float32(MASKED))[:, None, :, None, :]

    def _place(self, tiles: Tiles, of: Ints, ordinal: Ints, rows: int) -> None:
        """Notes where each query's heads stand in the joined output."""
        shape = self._shape
        group = shape.num_heads // shape.kv_heads
        count = tiles.length[of]
        item, at = np.repeat(np.arange(len(of)), count), _ordinals(count)
        head = np.arange(shape.num_heads)
        out = (
            self._base
            + (item[:, None] * shape.kv_heads + head[None] // group) * rows
            + at[:, None] * group
            + head[None] % group
        )
        self._placed.append((tiles.first[of][item] + at, ordinal[item], out))
        self._base += len(of) * shape.kv_heads * rows
