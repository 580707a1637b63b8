"""What a step tells the worker. Plain values: they leave the engine thread and are never changed."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, replace
from typing import NamedTuple

from core.blocks import BlockRecord, Closing
from core.cost_model import StepShape
from core.request import AttemptKey, AttemptTiming, TokenEvent

NO_SHAPE = StepShape()


@dataclass(frozen=True, slots=True)
class Committed:
    """Full blocks of an attempt that is to be handed over, leased to it: just computed, or found in the cache at admission.

    Records come in order of index and each index once. Their digest is what the inventory knows, 0 when nothing.
    """

    key: AttemptKey
    records: tuple[BlockRecord, ...]


@dataclass(frozen=True, slots=True)
class Prefilled:
    """An attempt's prompt is computed and its first token sampled (that token is in `StepOutput.tokens` as well).

    Handed over or not: one that stays here to decode is reported too, with no partial block and nothing leased.
    `partial` is the unfinished last block of a hand-over, leased like the others.
    """

    key: AttemptKey
    closing: Closing
    partial: BlockRecord | None
    timing: AttemptTiming
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class GivenBack:
    """This worker ran short of memory; the attempt is the router's to place again, with the tokens delivered so far."""

    key: AttemptKey
    reason: str


class Failed(NamedTuple):
    """The attempt died here and placing it again elsewhere need not help. `late`: its deadline passed."""

    key: AttemptKey
    message: str
    late: bool = False


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """`waiting_tokens` is the prompt work ahead: tokens not yet computed of what waits and of prefills in progress.
    `context_tokens` is what the running sequences hold."""

    running: int
    waiting: int
    waiting_tokens: int
    context_tokens: int = 0


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Everything that one step changed.

    `left` names every attempt the loop holds nothing of any more, whatever the reason (ended, handed over, given back,
    failed, cancelled), each once. `joined` are hand-overs that entered the running batch. `num_tokens` were computed, in
    rows of which `shape` is the sum.
    """

    tokens: tuple[TokenEvent, ...] = ()
    committed: tuple[Committed, ...] = ()
    prefilled: tuple[Prefilled, ...] = ()
    joined: tuple[AttemptKey, ...] = ()
    left: tuple[AttemptKey, ...] = ()
    given_back: tuple[GivenBack, ...] = ()
    failed: tuple[Failed, ...] = ()
    num_tokens: int = 0
    shape: StepShape = NO_SHAPE

    def parted(self, apart: Container[AttemptKey]) -> tuple[StepOutput, StepOutput]:
        """What concerns the attempts in `apart`, and the rest, with which the counts stay."""

        def of(wanted: bool) -> StepOutput:
            return StepOutput(
                tuple(t for t in self.tokens if (t.key in apart) is wanted),
                tuple(c for c in self.committed if (c.key in apart) is wanted),
                tuple(p for p in self.prefilled if (p.key in apart) is wanted),
                tuple(key for key in self.joined if (key in apart) is wanted),
                tuple(key for key in self.left if (key in apart) is wanted),
                tuple(g for g in self.given_back if (g.key in apart) is wanted),
                tuple(f for f in self.failed if (f.key in apart) is wanted),
            )

        return of(True), replace(of(False), num_tokens=self.num_tokens, shape=self.shape)
