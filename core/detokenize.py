"""Tokens to text while they arrive, and stop strings found in that text. Pure: functions of the tokens seen so far.

Both objects are rebuilt after a failover by feeding them the token log again, and then go on with the same text.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

REPLACEMENT = "\ufffd"


class StreamDecoder(Protocol):
    """Incremental detokeniser of one choice. The texts returned, joined, are the decoding of all tokens pushed."""

    def push(self, token_id: int) -> str:
        """Text that this token completes: whole characters, never one that a later token would change; may be empty."""
        ...

    def flush(self) -> str:
        """What an unfinished character at the end decodes to (the replacement character), or nothing. Call once, last."""
        ...


class PieceDecoder:
    """For tokenizers whose text is the concatenation of per-token bytes: byte-level BPE, SentencePiece with byte fallback.

    `piece` maps a token id to its bytes, empty when it has no text. One table look-up and one incremental UTF-8 step per
    token, whatever came before.
    """

    __slots__ = ("_piece", "_utf8")

    def __init__(self, piece: Callable[[int], bytes]) -> None:
        self._piece = piece
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._piece(token_id))

    def flush(self) -> str:
        return self._utf8.decode(b"", True)


class WindowDecoder:
    """For every other tokenizer: decodes a short window twice, with and without the newest tokens, and emits the difference.

    The window starts one emission before the new text, so that joins between tokens (spaces, word pieces) come out as in
    the whole. Text ending in a replacement character is held back, at most `_MAX_HELD` tokens: no character is longer.
    """

    _MAX_HELD = 16
    __slots__ = ("_decode", "_held_from", "_ids")

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._held_from = 0  # tokens before it are emitted and only give context

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._new_text()
        held = len(self._ids) - self._held_from
        if held < self._MAX_HELD and (not text or text.endswith(REPLACEMENT)):
            return ""
        del self._ids[: self._held_from]
        self._held_from = len(self._ids)
        return text

    def flush(self) -> str:
        text = self._new_text()
        self._held_from = len(self._ids)
        return text

    def _new_text(self) -> str:
        before = self._decode(self._ids[: self._held_from]) if self._held_from else ""
        return self._decode(self._ids)[len(before) :]


class Matched(NamedTuple):
    """`text` may be shown; `stopped` says that a stop string followed it, and nothing more is to be shown."""

    text: str
    stopped: bool


class StopMatcher:
    """Finds the first stop string in text that arrives in pieces (Aho and Corasick, CACM 18(6), 1975).

    The first is the one that is complete first; of several complete at the same character, the longest. So the answer
    does not depend on how the text was cut into pieces. Text that may turn out to begin a stop string is held back. The
    cost is constant per character however many and however long the stop strings are.
    """

    __slots__ = ("_automaton", "_held", "_state", "stopped")

    def __init__(self, stops: Sequence[str]) -> None:
        self._automaton = _Automaton(stops) if stops else None
        self._held = ""
        self._state = 0
        self.stopped = False

    def push(self, text: str) -> Matched:
        """Takes the next piece. After a stop every further piece is swallowed."""
        if self.stopped:
            return Matched("", True)
        automaton = self._automaton
        if automaton is None:
            return Matched(text, False)
        base = len(self._held)
        state = self._state
        for index, char in enumerate(text):
            state = automaton.step(state, char)
            if found := automaton.found[state]:
                self.stopped = True
                shown = (self._held + text)[: base + index + 1 - found]
                self._held = ""
                return Matched(shown, True)
        self._state = state
        pending = self._held + text
        cut = len(pending) - automaton.depth[state]
        self._held = pending[cut:]
        return Matched(pending[:cut], False)

    def flush(self) -> str:
        """The text held back, now that nothing more will come."""
        held, self._held, self._state = self._held, "", 0
        return held


class _Automaton:
    """Trie of the stop strings with failure links. State 0 has matched nothing."""

    __slots__ = ("_fail", "_next", "depth", "found")

    def __init__(self, stops: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._fail = [0]
        self.depth = [0]  # characters matched, all of which a later match may still need
        self.found = [0]  # length of the longest stop string that ends here; 0: none
        for stop in stops:
            self._insert(stop)
        self._link()

    def step(self, state: int, char: str) -> int:
        following = self._next
        while state and char not in following[state]:
            state = self._fail[state]
        return following[state].get(char, 0)

    def _insert(self, stop: str) -> None:
        state = 0
        for char in stop:
            if char not in self._next[state]:
                self._next[state][char] = len(self._next)
                self._next.append({})
                self._fail.append(0)
                self.depth.append(self.depth[state] + 1)
                self.found.append(0)
            state = self._next[state][char]
        self.found[state] = len(stop)

    def _link(self) -> None:
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            for char, child in self._next[state].items():
                self._fail[child] = self.step(self._fail[state], char)
                self.found[child] = self.found[child] or self.found[self._fail[child]]
                queue.append(child)
