"""Pictures of simulations: timelines of pools, a grid of prefill and decode workers, cost against goodput."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sim.report_timeline import Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GRID, FAINT = "#1f2933", "#e4e7eb", "#7b8794"
COLOURS = {"prefill": "#c2410c", "decode": "#1d4ed8", "colocated": "#15803d"}
WIDTHS = (3.4, 2.0, 1.0)
SHARE = 0.9


@dataclass(frozen=True, slots=True)
class Plan:
    """One cluster: `goodput_rps` of all of it."""

    label: str
    cost_usd_per_hour: float
    goodput_rps: float


def svg(figure: Figure) -> str:
    """To stand in a page: without the preamble of a file, with the same ids each time."""
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "tandem", "svg.fonttype": "path"}):
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def timelines(timeline: Timeline) -> Figure:
    """Five rows over one time axis: attainment, workers, what waits, what runs, memory in use; a line per role."""
    figure = _figure(9.0, 9.2)
    rows: Any = figure.subplots(5, 1, sharex=True)
    met, *others = rows
    points = timeline.attainment()
    if points:
        met.fill_between(*zip(*points, strict=True), color=COLOURS["colocated"], alpha=0.18, linewidth=0)
        met.plot(*zip(*points, strict=True), color=COLOURS["colocated"], linewidth=1.6)
    met.axhline(SHARE, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
    _named(met, "requests within their limits", share=True)
    wanted = (
        (lambda pool: float(pool.workers), "workers", False),
        (lambda pool: pool.waiting, "waiting, per worker", False),
        (lambda pool: pool.running, "running, per worker", False),
        (lambda pool: pool.kv_used, "KV memory in use", True),
    )
    for axes, (value, title, share) in zip(others, wanted, strict=True):
        for width, role in zip(WIDTHS, timeline.roles(), strict=False):  # so that equal lines show all their colours
            axes.plot(*zip(*timeline.of(role, value), strict=True), color=COLOURS[role], linewidth=width, label=role)
        _named(axes, title, share)
    others[0].legend(loc="upper right", ncols=3, frameon=False, fontsize=9, bbox_to_anchor=(1, 1.28))
    others[-1].set_xlabel("virtual time, seconds", color=INK)
    return figure


def grid(goodput: Mapping[tuple[int, int], float], title: str) -> Figure:
    """`goodput`: by (prefill, decode) workers, requests per second and GPU; the best one is framed."""
    figure = _figure(5.6, 4.6)
    axes = figure.subplots()
    prefills, decodes = (sorted({key[side] for key in goodput}) for side in (0, 1))
    table = [[goodput.get((p, d), float("nan")) for d in decodes] for p in prefills]
    axes.imshow(table, cmap="GnBu", origin="lower", aspect="auto", vmin=0)
    best, most = max(goodput, key=lambda key: goodput[key]), max(goodput.values())
    for (p, d), value in goodput.items():
        x, y = decodes.index(d), prefills.index(p)
        axes.text(x, y, f"{value:#.3g}", ha="center", va="center", color="white" if value > 0.6 * most else INK, fontsize=10)
    axes.add_patch(_rectangle(decodes.index(best[1]) - 0.5, prefills.index(best[0]) - 0.5))
    axes.set_xticks(range(len(decodes)), [str(d) for d in decodes])
    axes.set_yticks(range(len(prefills)), [str(p) for p in prefills])
    axes.set_xlabel("decode workers", color=INK)
    axes.set_ylabel("prefill workers", color=INK)
    axes.set_title(title, loc="left", color=INK, fontsize=12, fontweight="bold")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, colors=INK)
    return figure


def frontier(plans: Sequence[Plan]) -> list[Plan]:
    """Those that no other one beats in both cost and goodput, by cost."""
    found: list[Plan] = []
    for plan in sorted(plans, key=lambda one: (one.cost_usd_per_hour, -one.goodput_rps)):
        if not found or plan.goodput_rps > found[-1].goodput_rps:
            found.append(plan)
    return found


def pareto(plans: Sequence[Plan], title: str) -> Figure:
    """Numbered along the frontier; who stands behind a number is named beside the picture, where names cannot overlap."""
    figure = _figure(9.6, 4.8)
    axes = figure.subplots()
    front = frontier(plans)
    rest = [plan for plan in plans if plan not in front]
    axes.scatter([p.cost_usd_per_hour for p in rest], [p.goodput_rps for p in rest], color=FAINT, s=28, zorder=2)
    costs, rates = [p.cost_usd_per_hour for p in front], [p.goodput_rps for p in front]
    axes.plot(costs, rates, color=COLOURS["decode"], linewidth=2, marker="o", markersize=6, zorder=3)
    for number, plan in enumerate(front, 1):
        at = (plan.cost_usd_per_hour, plan.goodput_rps)
        axes.annotate(str(number), at, xytext=(-4, 6), textcoords="offset points", color=INK, fontsize=9, ha="right")
        axes.plot([], [], linestyle="none", label=f"{number}   {plan.label}")
    axes.legend(
        title="P prefill, D decode, C colocated; * spot",
        title_fontsize=9,
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        handlelength=0,
        alignment="left",
    )
    _named(axes, title)
    axes.set_xlim(left=0)
    axes.margins(x=0.15, y=0.1)
    axes.set_xlabel("cost, dollars per hour", color=INK)
    axes.set_ylabel("goodput, requests per second", color=INK)
    return figure


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=160, layout="constrained")


def _rectangle(x: float, y: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), 1, 1, fill=False, edgecolor=COLOURS["prefill"], linewidth=2.5)


def _named(axes: Axes, title: str, share: bool = False) -> None:
    from matplotlib.ticker import PercentFormatter

    axes.set_title(title, loc="left", color=INK, fontsize=11, fontweight="bold")
    axes.set_ylim(0, 1.03 if share else None)
    if share:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9)
