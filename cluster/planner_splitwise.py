"""Splitwise's provisioning: how many machines of which kind for prompts and for tokens. Deciding code.

Patel et al., ISCA 2024: a design (who computes prompts, who tokens) is swept over the grid of pool sizes within a
budget; `evaluate` plays a short trace; whoever keeps all nine slow-downs is a candidate; the objective picks. Cost and power
are those of its released notebooks, per machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

SLOWDOWNS: Mapping[str, tuple[float, float, float]] = MappingProxyType(
    {"ttft": (2.0, 3.0, 6.0), "tbt": (1.25, 1.5, 5.0), "e2e": (1.25, 1.5, 5.0)}
)
"""Limits at p50, p90 and p99 against an uncontended DGX-A100."""
PERCENTILES = (0.50, 0.90, 0.99)


@dataclass(frozen=True, slots=True)
class Sku:
    """A machine of eight GPUs; cost and power in the notebooks' units."""

    name: str
    cost: float
    power: float


A100 = Sku("a100-80gb", 2.21, 24.8)
H100 = Sku("h100-80gb", 4.76, 44.0)
H100_CAPPED = Sku("h100-80gb", 4.76, 44.0 * 0.7)
"""Decodes hardly feel the cap, prompts do: only token machines are capped, and take the time of whole ones."""


@dataclass(frozen=True, slots=True)
class Design:
    """`token` None: every machine does both (the baseline)."""

    name: str
    prompt: Sku
    token: Sku | None


DESIGNS: Mapping[str, Design] = MappingProxyType(
    {
        design.name: design
        for design in (
            Design("Baseline-A100", A100, None),
            Design("Baseline-H100", H100, None),
            Design("Splitwise-AA", A100, A100),
            Design("Splitwise-HH", H100, H100),
            Design("Splitwise-HHcap", H100, H100_CAPPED),
            Design("Splitwise-HA", H100, A100),
        )
    }
)


@dataclass(frozen=True, slots=True)
class Sizes:
    """A design with numbers of machines. Of a baseline all are in `prompt`."""

    design: Design
    prompt: int
    token: int

    @property
    def machines(self) -> int:
        return self.prompt + self.token

    @property
    def cost(self) -> float:
        return self.prompt * self.design.prompt.cost + self.token * (self.design.token or self.design.prompt).cost

    @property
    def power(self) -> float:
        return self.prompt * self.design.prompt.power + self.token * (self.design.token or self.design.prompt).power


class Objective(Enum):
    COST = "cost"
    POWER = "power"

    def of(self, sizes: Sizes) -> float:
        return sizes.cost if self is Objective.COST else sizes.power


Slowdowns = Mapping[str, Sequence[float]]
"""Per metric its p50, p90 and p99 over the reference."""
Evaluate = Callable[[Sizes, float], Slowdowns]
"""At a rate in requests per second."""


@dataclass(frozen=True, slots=True)
class Found:
    """`rate_rps`: the highest of the swept rates that kept every limit; 0 when none did."""

    sizes: Sizes
    rate_rps: float


def broken(slowdowns: Slowdowns) -> str:
    """The first limit that does not hold ("tbt p90 1.62 > 1.5"), empty when all nine do."""
    for metric, limits in SLOWDOWNS.items():
        for percentile, limit, value in zip(PERCENTILES, limits, slowdowns[metric], strict=True):
            if value > limit:
                return f"{metric} p{100 * percentile:.0f} {value:.2f} > {limit:g}"
    return ""


def splits(design: Design, budget: float, objective: Objective, step: int = 5) -> list[Sizes]:
    """The largest clusters of the design within the budget: multiples of `step` as prompt machines, the rest for tokens."""
    if design.token is None:
        return [Sizes(design, int(budget / objective.of(Sizes(design, 1, 0))), 0)]
    prompt_price, token_price = objective.of(Sizes(design, 1, 0)), objective.of(Sizes(design, 0, 1))
    return [
        Sizes(design, prompt, int((budget - prompt * prompt_price + 1e-9) / token_price))
        for prompt in range(step, int((budget - token_price) / prompt_price) + 1, step)
    ]


def most_throughput(
    design: Design, budget: float, objective: Objective, rates: Sequence[float], evaluate: Evaluate, step: int = 5
) -> Found:
    """The split that keeps all limits at the highest of the rising `rates`; of equals the one nearest the middle of the grid.

    Splits are tried from the middle of the grid outwards and only at rates above the best so far, so most cost one play.
    """
    candidates = splits(design, budget, objective, step)
    middle = len(candidates) / 2
    best = Found(candidates[len(candidates) // 2], 0.0)
    for sizes in sorted(candidates, key=lambda one: abs(candidates.index(one) - middle)):
        while True:
            above = [rate for rate in rates if rate > best.rate_rps]
            if not above or broken(evaluate(sizes, above[0])):
                break
            best = Found(sizes, above[0])
    return best


def least(
    design: Design, rate_rps: float, objective: Objective, largest: Sizes, evaluate: Evaluate, step: int = 1
) -> Sizes | None:
    """The smallest cost or power that keeps all limits at the rate, up to the machines of `largest`; None if none does.

    Taken for granted: more machines never break a limit. So the fewest token machines are found for the most prompt machines,
    and from there the border is followed: prompt + token plays instead of their product.
    """

    def holds(prompt: int, token: int) -> bool:
        return not broken(evaluate(Sizes(design, prompt, token), rate_rps))

    if design.token is None:
        count = _fewest(largest.prompt, lambda prompt: holds(prompt, 0))
        return Sizes(design, count, 0) if count else None
    token = _fewest(largest.token, lambda token: holds(largest.prompt, token))
    if not token:
        return None
    found = [Sizes(design, largest.prompt, token)]
    for prompt in range(largest.prompt - step, 0, -step):
        while token <= largest.token and not holds(prompt, token):
            token += 1
        if token > largest.token:
            break
        found.append(Sizes(design, prompt, token))
    return min(found, key=lambda sizes: (objective.of(sizes), sizes.machines))


def _fewest(most: int, holds: Callable[[int], bool]) -> int:
    """The least count from 1 to `most` that holds, 0 when none does."""
    low, high = 1, most
    if not holds(high):
        return 0
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low
