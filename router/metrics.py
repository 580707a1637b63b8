"""What the router counts, and its form for Prometheus, made when it is scraped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from core.errors import TandemError
from core.report import Demand
from core.telemetry import Histogram, histogram_family
from router.attainment import Attainment
from router.dispatch import Dispatcher
from router.frontend_types import Timing, Usage
from router.journey import State
from router.prior import Prior

TTFT_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0)
TOKEN_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 10.0)
TOTAL_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class RouterStats:
    """Plain numbers; the asyncio thread alone writes them."""

    def __init__(self) -> None:
        self.ttft_s = Histogram(TTFT_SECONDS)
        self.itl_s = Histogram(TOKEN_SECONDS)
        self.tpot_s = Histogram(TOKEN_SECONDS)
        self.e2e_s = Histogram(TOTAL_SECONDS)
        self.attainment = Attainment()
        self.outcomes: Counter[str] = Counter()
        self.running = 0
        self.tokens = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.demand = Demand()
        """For the controller, which forecasts from it."""

    def came(self) -> None:
        """A request, whatever becomes of it."""
        self.demand = self.demand._replace(requests=self.demand.requests + 1)

    def gaps(self, gap_s: float, count: int) -> None:
        """`count` tokens came at once, `gap_s` after the one before: one gap, and no gap between them."""
        self.itl_s.observe(gap_s)
        for _ in range(count - 1):
            self.itl_s.observe(0.0)

    def completed(self, timing: Timing, usage: Usage) -> None:
        self.outcomes["completed"] += 1
        self.prompt_tokens += usage.prompt_tokens
        self.cached_tokens += usage.cached_tokens
        self._answered(usage)
        self.e2e_s.observe(timing.total_s)
        if timing.ttft_s > 0:
            self.ttft_s.observe(timing.ttft_s)
        if timing.tpot_s > 0:
            self.tpot_s.observe(timing.tpot_s)

    def _answered(self, usage: Usage) -> None:
        was = self.demand
        self.demand = Demand(
            was.requests,
            was.answered + 1,
            was.prompt_tokens + usage.prompt_tokens,
            was.prompt_squares + usage.prompt_tokens**2,
            was.cached_tokens + usage.cached_tokens,
            was.answer_tokens + usage.completion_tokens,
            was.answer_squares + usage.completion_tokens**2,
        )

    def failed(self, error: TandemError) -> None:
        """Refused before it began, or ended by an error: told apart by the error's code."""
        self.outcomes[error.code] += 1


class RouterMetrics(Collector):
    """Reads dispatcher and stats when Prometheus comes by."""

    def __init__(self, stats: RouterStats, dispatcher: Dispatcher) -> None:
        self._stats = stats
        self._dispatcher = dispatcher

    def collect(self) -> Iterable[Metric]:
        stats, dispatcher = self._stats, self._dispatcher
        yield histogram_family("tandem_router_ttft_seconds", "Arrival to first token", [(stats.ttft_s, {})])
        yield histogram_family("tandem_router_itl_seconds", "Gap between two tokens", [(stats.itl_s, {})])
        yield histogram_family("tandem_router_tpot_seconds", "Mean token gap of a request", [(stats.tpot_s, {})])
        yield histogram_family("tandem_router_e2e_seconds", "Arrival to last token", [(stats.e2e_s, {})])
        yield _by_outcome("tandem_router_requests", "Requests that ended", stats.outcomes)
        yield _by_outcome("tandem_router_attempts", "Placements that ended", dispatcher.attempts)
        journeys = GaugeMetricFamily("tandem_router_journeys", "Choices under way, by state", labels=["state"])
        states = dispatcher.states()
        for state in State:
            if state is not State.DONE:
                journeys.add_metric([state.name.lower()], states[state])
        yield journeys
        yield GaugeMetricFamily("tandem_router_requests_running", "Requests under way", value=stats.running)
        yield GaugeMetricFamily("tandem_router_queued", "Choices waiting for a place", value=len(dispatcher.queue))
        yield _counter("tandem_router_failovers", "Placements that were lost and made again", dispatcher.failovers)
        yield _counter("tandem_router_generated_tokens", "Tokens delivered", stats.tokens)
        yield _counter("tandem_router_prompt_tokens", "Prompt tokens of completed requests", stats.prompt_tokens)
        yield _counter("tandem_router_cached_prompt_tokens", "... that a worker had cached", stats.cached_tokens)
        yield self._workers()
        yield from self._goodput()
        yield from self._predictions()

    def _goodput(self) -> Iterable[Metric]:
        attained = self._stats.attainment
        outcomes = attained.outcomes
        yield _by("tandem_router_goodput", "Requests by whether they met all their limits", ("class", "outcome"), outcomes)
        text = "Limits that completed requests missed"
        yield _by("tandem_router_slo_violations", text, ("class", "limit"), attained.violations)
        parts = [(histogram, {"part": part}) for part, histogram in attained.parts.items()]
        yield histogram_family("tandem_router_request_part_seconds", "Where the time until the second token went", parts)

    def _predictions(self) -> Iterable[Metric]:
        errors = self._dispatcher.placer.errors
        for name, what, table in (("ttft", "time to first token", errors.ttft), ("tpot", "mean token gap", errors.tpot)):
            rows = [(histogram, {"policy": policy}) for policy, histogram in sorted(table.items())]
            text = f"|predicted - actual| / actual of the {what}"
            yield histogram_family(f"tandem_router_{name}_prediction_error_ratio", text, rows)

    def _workers(self) -> Metric:
        family = GaugeMetricFamily("tandem_router_workers_connected", "Workers with a session", labels=["role"])
        situation = self._dispatcher.situation()
        known = situation.view.workers
        roles = Counter(known[name].role.value for name in situation.connected if name in known)
        for role, count in sorted(roles.items()):
            family.add_metric([role], count)
        return family


class PriorMetrics(Collector):
    """How far workers have departed from the cost model that was configured."""

    def __init__(self, prior: Prior) -> None:
        self._prior = prior

    def collect(self) -> Iterable[Metric]:
        name, text = "tandem_router_cost_drift_ratio", "What a worker's steps take, over what router.cost_model says"
        family = GaugeMetricFamily(name, text, labels=["worker"])
        for worker, factor in sorted(self._prior.factors.items()):
            family.add_metric([worker], factor)
        yield family


def _by(name: str, text: str, labels: tuple[str, ...], counts: Counter[tuple[str, str]]) -> Metric:
    family = CounterMetricFamily(name, text, labels=labels)
    for values, count in sorted(counts.items()):
        family.add_metric(values, count)
    return family


def _by_outcome(name: str, text: str, counts: Counter[str]) -> Metric:
    family = CounterMetricFamily(name, text, labels=["outcome"])
    for outcome, count in sorted(counts.items()):
        family.add_metric([outcome], count)
    return family


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)
