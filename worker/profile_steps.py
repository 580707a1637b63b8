"""Measures what steps cost here, by driving the engine itself through steps of chosen shapes: see `tandem profile`.

KV is handed in, not computed: what a step takes does not depend on the values in it. So a step behind a context of a
thousand tokens costs one step to measure, not a prompt.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from core.blocks import blocks_for
from core.config import EngineConfig
from core.cost_model import StepShape
from core.errors import ConfigError
from core.request import AttemptKey, WorkItem
from engine.loop import StepLoop
from tandem.sampling import SamplingParams
from worker.colocated import ColocatedRole
from worker.node import Node

ROUNDS = 3
"""Through all points, each in another order; the median counts, so that what else the machine does for a while does not."""
POINTS_MIN = 10
DECODE_STEPS = 5
"""Run at each point of streams alone; their median counts, at the shape of the middle one."""
KV_FILL = 0x3C
"""Of every byte of KV: a small number in fp32 and bf16 alike, and memory that has been touched."""


@dataclass(frozen=True, slots=True)
class Point:
    """One step: `new_tokens` of a prompt behind `context` (0: none), beside `rows` streams of `rows_context` tokens each."""

    new_tokens: int = 0
    context: int = 0
    rows: int = 0
    rows_context: int = 0

    def blocks(self, block_size: int) -> int:
        """That must be had at once."""
        each = blocks_for(self.rows_context + DECODE_STEPS + 2, block_size)
        return self.rows * each + blocks_for(self.new_tokens + self.context, block_size)


def grid(engine: EngineConfig, context_max: int, num_blocks: int, block_size: int) -> list[Point]:
    """Prompts by new tokens and context, streams by batch and context, and both in one step; what fits of it."""
    chunk_max = engine.max_step_tokens
    chunks = sorted({n for n in (4, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048) if n < chunk_max} | {chunk_max})
    batches = [
        n for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256) if n <= min(engine.max_running, chunk_max * 3 // 4)
    ]
    contexts = [n for n in (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192) if n < context_max - chunk_max]
    contexts.append(max(1, context_max - chunk_max))
    points = [Point(n, context) for n in chunks for context in (0, *contexts[1::2])]
    points += [Point(rows=n, rows_context=context) for n in batches for context in contexts]
    points += [Point(n, 0, rows, 128) for n in chunks[:-1:2] for rows in batches[1::3] if n + rows <= chunk_max]
    longest = context_max - DECODE_STEPS - 2
    short = [point for point in points if max(point.new_tokens + point.context, point.rows_context) <= longest]
    return [point for point in short if point.blocks(block_size) <= num_blocks * 3 // 4]


def points_of(node: Node, engine: EngineConfig) -> list[Point]:
    """What `StepMeter` can measure on this node. Raises ConfigError when that is too little for a fit."""
    num_blocks, block_size = node.inventory.counts().total, node.layout.block_size
    kv_tokens = num_blocks * block_size
    points = grid(engine, min(node.facts.max_model_len, kv_tokens), num_blocks, block_size)
    if len(points) < POINTS_MIN or not any(point.new_tokens for point in points) or not any(point.rows for point in points):
        raise ConfigError(
            f"engine.kv_bytes holds {kv_tokens} tokens, too few to measure steps of different sizes; raise engine.kv_bytes"
        )
    return points


class StepMeter:
    """Owns the node's engine while it measures. Blocks the thread that calls it."""

    def __init__(self, node: Node, engine: EngineConfig, seed: int = 0) -> None:
        node.arena.bytes_view().fill(KV_FILL)
        self._node = node
        self._rng = random.Random(seed)
        config = engine.model_copy(update={"prefix_cache": False})
        self._loop = StepLoop(config, ColocatedRole(), node.inventory, node.executor, node.root_key)
        self._asked = 0

    def measure(self, point: Point) -> tuple[StepShape, float]:
        """One step of this shape and its seconds."""
        if point.new_tokens:
            return self._step_for(point)
        keys = self._streams(point)
        steps = [self._timed() for _ in range(DECODE_STEPS)]
        self._drop(keys)
        return steps[DECODE_STEPS // 2][0], median(seconds for _, seconds in steps)

    def _step_for(self, point: Point) -> tuple[StepShape, float]:
        keys = self._streams(point)
        if point.new_tokens:
            keys.append(self._enter(point.context, point.new_tokens))
        step = self._timed()
        self._drop(keys)
        return step

    def _streams(self, point: Point) -> list[AttemptKey]:
        return [self._enter(point.rows_context, 1) for _ in range(point.rows)]

    def _enter(self, context: int, pending: int) -> AttemptKey:
        self._asked += 1
        key = AttemptKey(f"profile-{self._asked}", 1)
        vocab = self._node.facts.vocab_size
        tokens = tuple(self._rng.randrange(vocab) for _ in range(context + pending))
        sampling = SamplingParams(max_tokens=DECODE_STEPS + 2, temperature=0.0, seed=0, ignore_eos=True)
        item = WorkItem(key, tokens, len(tokens), sampling)
        block_size = self._node.layout.block_size
        blocks = self._node.inventory.allocate(blocks_for(context + pending, block_size))
        self._loop.submit(item, 0.0, blocks, context)
        return key

    def _timed(self) -> tuple[StepShape, float]:
        started = time.perf_counter()
        output = self._loop.step(started)
        seconds = time.perf_counter() - started
        if output.failed:
            raise ConfigError(f"the engine cannot compute this model here: {output.failed[0].message}")
        return output.shape, seconds

    def _drop(self, keys: list[AttemptKey]) -> None:
        for key in keys:
            self._loop.cancel(key)
        self._timed()  # tells of those that left


def measured(meter: StepMeter, points: list[Point], on_point: Callable[[], None]) -> list[tuple[StepShape, float]]:
    """A step of each point, in their order. `on_point` hears of each measurement, ROUNDS + 1 for every point."""
    seconds: list[list[float]] = [[] for _ in points]
    shapes: list[StepShape] = [StepShape() for _ in points]
    for turn in range(ROUNDS + 1):
        order = list(range(len(points)))
        random.Random(turn).shuffle(order)
        for index in order:
            shapes[index], taken = meter.measure(points[index])
            if turn:  # first use of a shape makes buffers; that is not what a step costs
                seconds[index].append(taken)
            on_point()
    return [(shape, median(taken)) for shape, taken in zip(shapes, seconds, strict=True)]
