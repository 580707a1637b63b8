"""When one pool is pressed and the other at ease: which worker should change sides. Deciding code; what comes of the
proposal is the controller's affair.

Damped three times, because a change of sides costs its worker the batch it had: pressures are smoothed, must stay apart for
a while, and after a change nothing is proposed before its effect can be seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from core.report import RoleProposal
from core.request import WorkerRole
from router.pools import Pool, best
from router.situation import Situation

SMOOTHED_OVER_S = 5.0
HOLD_S = 10.0
COOL_S = 60.0
PRESSED = 0.9
AT_EASE = 0.5
BEARABLE = 0.8
"""What the pool that gives a worker away may reach without it."""


@dataclass(frozen=True, slots=True)
class Pressure:
    """1 is what a pool can just bear. `prefill`: what a new prompt waits, over its TTFT limit; `decode`: the larger of
    memory in use and the token gap over its limit."""

    prefill: float
    decode: float


def pressure_of(situation: Situation, ttft_s: float, tbt_s: float) -> Pressure:
    """Means over the pools: a single busy worker is the placement's business."""
    prefill, decode = situation.prefill, situation.decode
    if not len(prefill) or not len(decode):
        return Pressure(0.0, 0.0)
    in_use = 1.0 - np.clip(decode.room_blocks / decode.blocks, 0.0, 1.0)
    gaps = np.where(decode.running > 0, decode.gap_s() / tbt_s, 0.0)
    return Pressure(float(np.mean(prefill.queue_s())) / ttft_s, float(max(np.mean(in_use), np.mean(gaps))))


class RoleAdvisor:
    """Asked a few times per second. Limits are those of the requests that matter most."""

    def __init__(self, ttft_s: float, tbt_s: float) -> None:
        assert ttft_s > 0, "nothing can be waited for in no time"
        assert tbt_s > 0, "tokens take time"
        self.smooth = Pressure(0.0, 0.0)
        self._ttft_s = ttft_s
        self._tbt_s = tbt_s
        self._seen_at: float | None = None
        self._apart: tuple[WorkerRole, float] | None = None  # which pool has been pressed, since when
        self._sizes: tuple[int, int] | None = None
        self._quiet_until = -math.inf

    def advise(self, situation: Situation, now: float) -> RoleProposal | None:
        """The same again until roles change or the pressure does."""
        self._watch_sizes(situation, now)
        self._smoothen(pressure_of(situation, self._ttft_s, self._tbt_s), now)
        pressed = self._pressed_pool()
        if pressed is None or now < self._quiet_until:
            self._apart = None
            return None
        if self._apart is None or self._apart[0] is not pressed:
            self._apart = (pressed, now)
        if now - self._apart[1] < HOLD_S:
            return None
        return self._propose(situation, pressed)

    def _watch_sizes(self, situation: Situation, now: float) -> None:
        """Workers came, went or changed sides: what was seen before says little."""
        sizes = (len(situation.prefill), len(situation.decode))
        if self._sizes is not None and sizes != self._sizes:
            self._quiet_until = now + COOL_S
        self._sizes = sizes

    def _smoothen(self, seen: Pressure, now: float) -> None:
        passed_s = max(0.0, now - self._seen_at) if self._seen_at is not None else 0.0
        share = 1.0 - math.exp(-passed_s / SMOOTHED_OVER_S)
        self._seen_at = now
        self.smooth = Pressure(
            self.smooth.prefill + share * (seen.prefill - self.smooth.prefill),
            self.smooth.decode + share * (seen.decode - self.smooth.decode),
        )

    def _pressed_pool(self) -> WorkerRole | None:
        if self.smooth.prefill >= PRESSED and self.smooth.decode <= AT_EASE:
            return WorkerRole.PREFILL
        if self.smooth.decode >= PRESSED and self.smooth.prefill <= AT_EASE:
            return WorkerRole.DECODE
        return None

    def _propose(self, situation: Situation, pressed: WorkerRole) -> RoleProposal | None:
        to_prefill = pressed is WorkerRole.PREFILL
        giver: Pool = situation.decode if to_prefill else situation.prefill
        eased, high = (self.smooth.decode, self.smooth.prefill) if to_prefill else (self.smooth.prefill, self.smooth.decode)
        others = len(giver) - 1
        if others < 1 or eased * len(giver) / others > BEARABLE:
            return None
        everybody = giver.allowed(frozenset())
        row = best(giver.running, everybody, giver.context) if to_prefill else best(giver.waiting_tokens, everybody)
        assert row is not None, "the pool has two workers at least"
        other = "decode" if to_prefill else "prefill"
        reason = f"{pressed.value} is at {high:.1f} of what it can bear, {other} at {eased:.1f}"
        return RoleProposal(giver.names[row], pressed, reason)
