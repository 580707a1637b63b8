"""Measures, at start, which sizes of attention products are batch-invariant on this processor."""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

from engine.attention_plan import MASKED, Limits, chunk_tokens

_log = logging.getLogger(__name__)
_CHUNKS = (512, 384, 256, 128)
_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 48, 64, 128, 256)
_FEWEST = 4
_MOST = 32  # padding every decoding query to more rows than this would cost more than exactness is worth


def choose_limits(head_dim: int, block_size: int) -> Limits:
    """The longest chunk of keys, and for it the fewest query rows from which on products come out the same bits whatever
    the number of rows and items and however many masked keys stand behind the real ones.
    """
    return _measured_limits(head_dim, block_size, torch.get_num_threads())


@cache
def _measured_limits(head_dim: int, block_size: int, _threads: int) -> Limits:
    for wanted in _CHUNKS:
        chunk = chunk_tokens(block_size, wanted)
        rows = _fewest_rows(head_dim, chunk)
        if rows <= _MOST:
            _log.info("attention is batch-invariant with chunks of %d keys and at least %d query rows", chunk, rows)
            return Limits(rows=max(_FEWEST, rows), chunk=chunk)
    _log.warning("attention is not batch-invariant on this processor: a result may depend on the batch in the last bit")
    return Limits(rows=8, chunk=chunk_tokens(block_size, _CHUNKS[-1]))


def _fewest_rows(head_dim: int, chunk: int) -> int:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(4, max(_ROWS), head_dim, generator=generator)
    keys = torch.randn(4, chunk, head_dim, generator=generator)
    fewest = 1
    for real in sorted({16, chunk // 3, chunk // 2 + 16, chunk - 16, chunk}):
        scores, out = _attention(query, keys, real)
        for rows in _ROWS:
            if rows >= fewest and not _same(query[:, :rows], keys, real, scores[:, :rows], out[:, :rows]):
                fewest = rows + 1
    return fewest


def _same(query: Tensor, keys: Tensor, real: int, scores: Tensor, out: Tensor) -> bool:
    """Do these query rows give the same bits for one item and several, with few and many masked keys behind the real ones?"""
    whole = keys.shape[1]
    narrow = -(-real // 16) * 16
    for items in (1, 3, 4):
        for width in {narrow, min(narrow + 16, whole), whole}:
            mine, result = _attention(query[:items].contiguous(), keys[:items, :width].contiguous(), real)
            if not torch.equal(mine[:, :, :real], scores[:items, :, :real]) or not torch.equal(result, out[:items]):
                return False
    return True


def _attention(query: Tensor, keys: Tensor, real: int) -> tuple[Tensor, Tensor]:
    scores = torch.bmm(query, keys.transpose(1, 2))
    scores[:, :, real:] += MASKED
    return scores, torch.bmm(torch.softmax(scores, -1), keys)
