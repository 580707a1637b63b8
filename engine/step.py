"""What the scheduler asks of the executor in one step, and what comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from core.blocks import KvLayout
from tandem.sampling import SamplingParams


class SampleSpec(NamedTuple):  # like Row a tuple: two are made for every token, at a third of a frozen dataclass's cost
    """How to choose the token after a row. The draw depends on `(seed, choice, position)` and the logits alone.

    `history` is the sequence's tokens so far, prompt included (`prompt_len` of them), for the penalties.
    """

    params: SamplingParams
    choice: int
    position: int
    history: Sequence[int]
    prompt_len: int


class Row(NamedTuple):
    """One sequence's share of a step: compute `token_ids`, whose first stands at `start`; KV before it is in `blocks`.

    `blocks` covers at least `start + len(token_ids)` tokens. It only grows from step to step, unless `Executor.forget` was
    called in between: blocks that another sequence computed first are swapped in so. It and the history are the
    scheduler's own, to be read during the step and not kept. `sample` is None when no token is to be chosen (a chunk
    that is not the prompt's last).
    """

    seq_id: int
    token_ids: Sequence[int]
    start: int
    blocks: Sequence[int]
    sample: SampleSpec | None


@dataclass(frozen=True, slots=True)
class StepPlan:
    rows: tuple[Row, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(row.token_ids) for row in self.rows)


class Sampled(NamedTuple):
    seq_id: int
    token_id: int
    logprob: float | None
    top_logprobs: tuple[tuple[int, float], ...]


class Executor(Protocol):
    """Owns model and KV memory; called from one thread."""

    @property
    def layout(self) -> KvLayout: ...

    @property
    def num_blocks(self) -> int: ...

    def run(self, plan: StepPlan) -> list[Sampled]:
        """Computes the plan's tokens, writes their KV into the rows' blocks, samples where asked, in row order.

        After an exception the rows may come again, one by one: computing a row twice must change nothing.
        """
        ...

    def forget(self, seq_id: int) -> None:
        """Drops whatever is remembered of a sequence: it left, or its blocks changed and its next row brings all anew."""
        ...
