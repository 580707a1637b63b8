"""The tokens of one choice: each position once, in order. All that failover needs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from core.request import FinishReason, TokenEvent


class TokenLog:
    """Accepts the token of position n only when it holds n tokens.

    A duplicate is dropped. A token ahead of its turn is kept when the caller says that an earlier one is still on its
    way over another session (the first token comes from prefill, the second from decode, and two connections have no
    common order); otherwise it is a gap.
    """

    def __init__(self, max_tokens: int, stop_ids: Collection[int]) -> None:
        self.ids: list[int] = []
        self.finished: FinishReason | None = None
        self._max_tokens = max_tokens
        self._stop_ids = frozenset(stop_ids)
        self._early: dict[int, TokenEvent] = {}

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def waits_for_earlier(self) -> bool:
        """A token is kept whose predecessor has not come."""
        return bool(self._early)

    def forget_early(self) -> None:
        """The attempt that sent them is over; the next one sends them again."""
        self._early.clear()

    def run_on(self, tokens: Sequence[TokenEvent]) -> bool:
        """Takes tokens that are just what is next and none of which ends it: nearly all are. Otherwise nothing, and False."""
        place = len(self.ids)
        if self._early or self.finished is not None or place + len(tokens) >= self._max_tokens:
            return False
        for token in tokens:
            if token.position != place or token.finish_reason is not None or token.token_id in self._stop_ids:
                return False
            place += 1
        self.ids += [token.token_id for token in tokens]
        return True

    def accept(self, tokens: Iterable[TokenEvent], *, hold: bool) -> tuple[tuple[TokenEvent, ...], bool]:
        """Takes what is next. Returns (accepted in order, whether a gap was met); sets `finished` on the last token."""
        accepted: list[TokenEvent] = []
        tokens = tuple(tokens)
        if len(tokens) > 1 and self._extend(tokens):
            return tokens, False
        for token in tokens:
            position = token.position
            if self.finished is not None or position < len(self.ids):
                continue
            if position >= self._max_tokens:
                return tuple(accepted), True
            if position > len(self.ids):
                if not hold:
                    return tuple(accepted), True
                self._early[position] = token
                continue
            self._append(token, accepted)
            while self.finished is None and len(self.ids) in self._early:
                self._append(self._early.pop(len(self.ids)), accepted)
        return tuple(accepted), False

    def _extend(self, tokens: tuple[TokenEvent, ...]) -> bool:
        """Takes many at once where they are just what is next and at most the last one ends it; else nothing."""
        ids, have = [token.token_id for token in tokens], len(self.ids)
        if self._early or self.finished is not None or have + len(tokens) > self._max_tokens:
            return False
        if any(token.position != place for place, token in enumerate(tokens, have)):
            return False
        if any(token.finish_reason is not None for token in tokens[:-1]) or not self._stop_ids.isdisjoint(ids[:-1]):
            return False
        self.ids += ids[:-1]
        self._append(tokens[-1], [])
        return True

    def _append(self, token: TokenEvent, accepted: list[TokenEvent]) -> None:
        self.ids.append(token.token_id)
        accepted.append(token)
        if token.finish_reason is not None:
            self.finished = token.finish_reason
        elif token.token_id in self._stop_ids:
            self.finished = FinishReason.STOP
        elif len(self.ids) >= self._max_tokens:
            self.finished = FinishReason.LENGTH
