"""Learns what steps cost from the steps that are run anyway. Deciding code.

Most steps are alike: a model fitted to the latest thousand would know one shape. So the latest few of every *kind* of step
are kept, a kind being the powers of two of what is in it.
"""

from __future__ import annotations

from collections import OrderedDict, deque

from core.cost_fit import fit_steps
from core.cost_model import Fit, StepShape

KINDS_MAX = 128
PER_KIND = 8
REFIT_EVERY = 32
SAMPLES_MIN = 16

_Kind = tuple[int, int, int, int]


class StepLearner:
    """`observe` costs a microsecond or two; `fit` a few hundred, and only when enough is new."""

    def __init__(self) -> None:
        self._kinds: OrderedDict[_Kind, deque[tuple[StepShape, float]]] = OrderedDict()
        self._new = 0
        self._fit: Fit | None = None

    def observe(self, shape: StepShape, seconds: float) -> None:
        if not seconds > 0:
            return
        kind = (
            shape.prefill_tokens.bit_length(),
            shape.prefill_pairs.bit_length(),
            shape.decode_rows.bit_length(),
            shape.decode_context.bit_length(),
        )
        samples = self._kinds.get(kind)
        if samples is None:
            samples = self._kinds[kind] = deque(maxlen=PER_KIND)
            if len(self._kinds) > KINDS_MAX:
                self._kinds.popitem(last=False)
        else:
            self._kinds.move_to_end(kind)
        samples.append((shape, seconds))
        self._new += 1

    def fit(self) -> Fit | None:
        """What is known by now; None before enough was seen. Each kind counts once, by its median step."""
        if self._new >= REFIT_EVERY or (self._fit is None and self._new >= SAMPLES_MIN):
            typical = [sorted(samples, key=lambda s: s[1])[len(samples) // 2] for samples in tuple(self._kinds.values())]
            if len(typical) >= 5:
                self._fit = fit_steps(typical)
                self._new = 0
        return self._fit
