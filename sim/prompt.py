"""Prompts of which only lengths and names of blocks matter, and real token ids made from the same names.

A trace names blocks, not tokens. Names chain: what a prompt shares with another one is what their leading names agree on, so a
block's key here is a mix of all names up to it, as the product's is a hash of all tokens up to it. (The mixer is splitmix64:
Steele, Lea and Flood, OOPSLA 2014; nobody attacks a simulation.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from core.blocks import KEY_BYTES, BlockKey
from sim.workload import Arrival

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
OWN = 0xD1B54A32D192ED03
"""Keeps the numbers of requests apart from the names of blocks."""
STOP_ID = 0
"""The token that ends an answer; no other token has this id."""
VOCABULARY = 50_000

Words = npt.NDArray[np.uint64]


def mix(word: int) -> int:
    """One step of splitmix64."""
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & MASK
    return word ^ (word >> 31)


def mixed(words: Words) -> Words:
    """As `mix`, of many."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


class Content:
    """What a request says and is told. `number` is the request's own: what no other one shares is made from it."""

    __slots__ = ("_chain", "_keys", "block_tokens", "input_tokens", "number", "output_tokens", "size")

    def __init__(self, arrival: Arrival, number: int, size: int) -> None:
        """`size`: tokens per block of KV."""
        self.number = mix(((number + 1) * GOLDEN & MASK) ^ OWN)
        self.size = size
        self.input_tokens = arrival.input_tokens
        self.output_tokens = arrival.output_tokens
        self.block_tokens = arrival.block_tokens if arrival.blocks else arrival.input_tokens
        chain, before = [], 0
        for name in arrival.blocks or (self.number,):
            before = mix((before + name + 1) * GOLDEN & MASK)
            chain.append(before)
        self._chain = np.array(chain, dtype=np.uint64)
        self._keys: list[BlockKey] = []

    def keys(self, full_blocks: int) -> list[BlockKey]:
        """Of the first so many blocks of the prompt and the answer behind it."""
        known = self._keys
        if len(known) < full_blocks:
            whole = (self.input_tokens + self.output_tokens) // self.size
            first, last = len(known), max(full_blocks, whole)
            known += self._make(first, last)
        return known if len(known) == full_blocks else known[:full_blocks]

    def token(self, position: int) -> int:
        """Of the answer: the token at that position."""
        if position >= self.output_tokens - 1:
            return STOP_ID
        return 1 + mix(self.number + (position + 1) * GOLDEN & MASK) % VOCABULARY

    def prompt_ids(self) -> tuple[int, ...]:
        """Real tokens, the same wherever the names say so."""
        places = np.arange(self.input_tokens, dtype=np.uint64)
        words = mixed(self._chain[self._names(places)] + (places + np.uint64(1)) * np.uint64(GOLDEN))
        ids: list[int] = (np.uint64(1) + words % np.uint64(VOCABULARY)).tolist()
        return tuple(ids)

    def _names(self, places: Words) -> npt.NDArray[np.int64]:
        names: npt.NDArray[np.int64] = (places // np.uint64(self.block_tokens)).astype(np.int64)
        return np.minimum(names, len(self._chain) - 1)

    def _make(self, first: int, last: int) -> list[BlockKey]:
        numbers = np.arange(first, last, dtype=np.uint64)
        ends = (numbers + np.uint64(1)) * np.uint64(self.size)
        chain = self._chain[self._names(ends - np.uint64(1))]
        chain = np.where(ends > self.input_tokens, np.uint64(self.number), chain)
        words = np.empty((last - first, 2), dtype="<u8")
        words[:, 0] = mixed(chain + (numbers + np.uint64(1)) * np.uint64(GOLDEN))
        words[:, 1] = chain
        packed = words.tobytes()
        return [packed[at : at + KEY_BYTES] for at in range(0, len(packed), KEY_BYTES)]


class Prompt:
    """As much of a tuple of token ids as router and scheduler ask for: its length, and what follows it."""

    __slots__ = ("_length", "content")

    def __init__(self, content: Content, length: int) -> None:
        self.content = content
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __add__(self, generated: tuple[int, ...]) -> Prompt:
        return Prompt(self.content, self._length + len(generated))

    def __iter__(self) -> Iterator[int]:
        raise AssertionError("nobody asks a counted prompt for its tokens")

    def __getitem__(self, place: Any) -> Any:
        raise AssertionError("nobody asks a counted prompt for its tokens")
