"""The executor over torch: one forward pass over the packed tokens of a step, then the sampler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.blocks import KvLayout, blocks_for
from engine.attention import PagedAttention
from engine.attention_plan import Ints, Queries
from engine.load import LoadedModel
from engine.native_attention import NativeAttention
from engine.sampler import Sampler
from engine.step import Row, Sampled, StepPlan


class _Packed(NamedTuple):
    """The tokens of a step side by side, padded to the rows the products want."""

    token_ids: Tensor
    positions: Tensor
    queries: Queries
    last: Ints  # row of each sequence's last token


class TorchExecutor:
    """Owns the model and its KV memory `kv` [num_blocks, layers, 2, kv_heads, block_size, head_dim]; one thread calls it.

    `kv` is usually a view of shared memory and must hold finite numbers (fresh shared memory is zero). A token's logits
    are the same bits whatever the batch beside it, however the prompt was cut and whichever blocks hold its prefix,
    as long as `loaded.batch_invariant` holds and the number of torch threads stays.
    """

    def __init__(self, loaded: LoadedModel, kv: Tensor) -> None:
        assert tuple(kv.shape[1:]) == loaded.layout.shape, f"blocks of {tuple(kv.shape[1:])} for {loaded.layout.shape}"
        assert kv.is_contiguous(), "kv is one span of whole blocks"
        self._loaded, self._model = loaded, loaded.model
        self._num_blocks = kv.shape[0]
        self._attention = _attention(loaded, kv)
        self._tables = _BlockTables()
        self._sampler = Sampler(loaded.spec.vocab_size)

    @property
    def layout(self) -> KvLayout:
        return self._loaded.layout

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    def run(self, plan: StepPlan) -> list[Sampled]:
        """Computes the plan's tokens, writes their KV into the rows' blocks, samples where asked, in row order."""
        if not plan.rows:
            return []
        with torch.inference_mode():
            chosen = [index for index, row in enumerate(plan.rows) if row.sample is not None]
            logits = self._logits(plan.rows, chosen)
            specs = [row.sample for row in plan.rows if row.sample is not None]
            picks = self._sampler.sample(logits, specs) if specs else []
        return [
            Sampled(plan.rows[index].seq_id, pick.token_id, pick.logprob, pick.top_logprobs)
            for index, pick in zip(chosen, picks, strict=True)
        ]

    def logits(self, plan: StepPlan) -> Tensor:
        """Like `run`, but returns the raw scores [rows, vocab] after each row's last token instead of sampling."""
        with torch.inference_mode():
            return self._logits(plan.rows, list(range(len(plan.rows))))

    def forget(self, seq_id: int) -> None:
        self._tables.forget(seq_id)

    def _logits(self, rows: Sequence[Row], chosen: list[int]) -> Tensor:
        packed = self._pack(rows)
        step = self._attention.step(packed.queries, packed.positions, len(packed.token_ids))
        hidden = self._model.forward(packed.token_ids, step)
        if not chosen:
            return hidden[:0]
        wanted = np.zeros(self._model.path.padded(len(chosen)), np.int64)
        wanted[: len(chosen)] = packed.last[chosen]
        return self._model.logits(hidden.index_select(0, torch.from_numpy(wanted)))[: len(chosen)]

    def _pack(self, rows: Sequence[Row]) -> _Packed:
        count = np.array([len(row.token_ids) for row in rows], np.int64)
        start = np.array([row.start for row in rows], np.int64)
        tables = self._tables.gather(rows, self.layout.block_size)
        # the kernels trust these numbers with memory
        assert 0 <= int(tables.min()) <= int(tables.max()) < self._num_blocks, "a block id beyond the KV memory"
        assert int((start + count).max()) <= self._loaded.max_model_len, "tokens beyond the context the model was loaded for"
        total = int(count.sum())
        first = np.cumsum(count) - count
        sequence = np.repeat(np.arange(len(rows)), count)
        position = start[sequence] + np.arange(total) - first[sequence]
        padded = self._model.path.padded(total)
        token_ids, positions = np.zeros(padded, np.int64), np.zeros(padded, np.int64)
        token_ids[:total] = [token for row in rows for token in row.token_ids]
        positions[:total] = position
        return _Packed(
            torch.from_numpy(token_ids),
            torch.from_numpy(positions),
            Queries(first, count, start, tables),
            first + count - 1,
        )


def _attention(loaded: LoadedModel, kv: Tensor) -> PagedAttention | NativeAttention:
    spec, turns, kernels = loaded.spec, loaded.model.rotations, loaded.model.path.kernels
    if kernels is not None and loaded.model.native_attention:
        return NativeAttention(kernels, kv, spec.num_heads, spec.windows, turns, spec.norm_eps)
    return PagedAttention(kv, spec.num_heads, spec.windows, turns, spec.norm_eps, loaded.limits)


class _BlockTables:
    """Block ids of each sequence as an array, kept between steps and extended as the sequence grows."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[list[int], NDArray[np.int64]]] = {}

    def gather(self, rows: Sequence[Row], block_size: int) -> Ints:
        """[rows, blocks] for the tokens of this step, short rows filled with their sequence's first block."""
        needed = [blocks_for(row.start + len(row.token_ids), block_size) for row in rows]
        tables = np.empty((len(rows), max(needed)), np.int64)
        for index, (row, used) in enumerate(zip(rows, needed, strict=True)):
            assert len(row.blocks) >= used, f"sequence {row.seq_id} has {len(row.blocks)} blocks, its tokens need {used}"
            array = self._array(row)
            tables[index, :used] = array[:used]
            tables[index, used:] = array[0]
        return tables

    def forget(self, seq_id: int) -> None:
        self._known.pop(seq_id, None)

    def _array(self, row: Row) -> NDArray[np.int64]:
        # A commit may swap a block for an equal one that was resident already, so the ids are compared, not only counted.
        blocks = list(row.blocks)
        known = self._known.get(row.seq_id)
        if known is None or known[0] != blocks:
            known = (blocks, np.array(blocks, np.int64))
            self._known[row.seq_id] = known
        return known[1]
