"""One request inside the engine: its tokens, how many of them have KV, and the blocks that KV lies in."""

from __future__ import annotations

from core.blocks import BlockKey, block_keys, blocks_for
from core.request import AttemptKey, FinishReason, WorkItem
from engine.role import Terms
from engine.step import Row, SampleSpec


class Sequence:
    """Mutable, owned by one StepLoop. Lengths in tokens: `0 <= computed < len(tokens) <= max_len`, blocks in between.

    `tokens` is the prompt and everything generated; the first `computed` have KV in `blocks`, the first
    `committed_blocks` of which are findable. `keys[i]` is the key of block i, known for a prefix of the full blocks.
    `seq_id` counts arrivals: the lower came first.
    """

    __slots__ = (
        "arrived", "blocks", "cached_tokens", "committed_blocks", "computed", "deadline", "first_scheduled", "item", "key",
        "keys", "max_len", "prompt_len", "reported", "root", "seq_id", "shared", "stop_ids", "terms", "tokens",
    )  # fmt: skip

    def __init__(self, seq_id: int, item: WorkItem, terms: Terms, root: BlockKey, now: float) -> None:
        self.seq_id = seq_id
        self.item = item
        self.key: AttemptKey = item.key
        self.terms = terms
        self.root = root
        self.tokens = list(item.token_ids)
        self.prompt_len = item.prompt_len
        self.max_len = item.max_len
        self.stop_ids = item.stop_ids
        self.blocks: list[int] = []
        self.computed = 0
        self.keys: list[BlockKey] = []
        self.committed_blocks = 0
        self.cached_tokens = 0
        self.arrived = now
        self.deadline = now + item.remaining_s if item.remaining_s > 0 else float("inf")
        self.first_scheduled: float | None = None
        self.reported = False  # its prefill was
        self.shared = True  # its blocks are what this model computes, so others hear of them
        assert len(self.tokens) < self.max_len, "a finished request has nothing to compute"

    def place(self, blocks: list[int], computed: int) -> None:
        """Takes over `blocks`, whose first `computed` tokens have KV. At least one token is left to compute."""
        assert not self.blocks, "a sequence is placed once"
        assert 0 <= computed < len(self.tokens), "the last token must be computed to have its logits"
        self.blocks = blocks
        self.computed = computed

    def evict(self) -> list[int]:
        """Forgets KV and blocks, which the caller releases; tokens and keys stay."""
        blocks, self.blocks = self.blocks, []
        self.computed = self.committed_blocks = 0
        return blocks

    @property
    def pending(self) -> int:
        """Tokens without KV; 1 while decoding."""
        return len(self.tokens) - self.computed

    def missing_blocks(self, block_size: int) -> int:
        return blocks_for(len(self.tokens), block_size) - len(self.blocks)

    def keys_until(self, full_blocks: int, block_size: int) -> list[BlockKey]:
        """Keys of the first `full_blocks` blocks. Each key is computed once."""
        if len(self.keys) < full_blocks:
            parent = self.keys[-1] if self.keys else self.root
            self.keys += block_keys(parent, self.tokens, block_size, len(self.keys))
        return self.keys[:full_blocks]

    def row(self, count: int) -> Row:
        """The next `count` tokens as a row; the last of them all asks for a sample."""
        start, tokens = self.computed, self.tokens
        sample = None
        if start + count == len(tokens):
            position = len(tokens) - self.prompt_len
            sample = SampleSpec(self.item.sampling, self.item.choice, position, tokens, self.prompt_len)
        return Row(self.seq_id, tokens[start : start + count], start, self.blocks, sample)

    def append(self, token_id: int) -> FinishReason | None:
        """A sampled token; the reason when it is the last."""
        self.tokens.append(token_id)
        if token_id in self.stop_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.tokens) >= self.max_len else None
