"""Which steps are measured: all kinds, and none that does not fit."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.config import EngineConfig
from worker.profile_steps import DECODE_STEPS, grid


@pytest.mark.parametrize(("chunk", "running"), [(256, 64), (16, 4), (2048, 256)])
def test_prompts_streams_and_both_are_measured_up_to_what_a_worker_computes(chunk: int, running: int) -> None:
    points = grid(EngineConfig(max_step_tokens=chunk, max_running=running), 4096, 20_000, 16)
    assert max(point.new_tokens for point in points) == chunk
    assert max(point.rows for point in points) <= running
    assert any(point.new_tokens and point.context for point in points)
    assert any(point.rows and not point.new_tokens for point in points)
    assert any(point.rows and point.new_tokens for point in points)
    assert len(set(points)) == len(points)


@settings(max_examples=100, deadline=None)
@given(
    chunk=st.integers(16, 4096),
    running=st.integers(1, 512),
    context=st.integers(16, 40_000),
    blocks=st.integers(1, 4000),
    block_size=st.sampled_from([4, 16, 64]),
)
def test_nothing_is_asked_that_does_not_fit(chunk: int, running: int, context: int, blocks: int, block_size: int) -> None:
    context = min(context, blocks * block_size)
    for point in grid(EngineConfig(max_step_tokens=chunk, max_running=running), context, blocks, block_size):
        assert point.blocks(block_size) <= blocks
        assert point.new_tokens + point.rows <= chunk
        assert point.rows <= running
        assert point.new_tokens + point.context <= context
        assert point.rows_context + DECODE_STEPS < context
