"""Draws attainment against rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core.latency import rate_at
from core.request import Slo

INK, GRID, FAINT = "#1f2933", "#e4e7eb", "#7b8794"
COLOURS = ("#1d4ed8", "#c2410c", "#15803d", "#7e22ce", "#0e7490", "#be123c", "#a16207", "#4b5563", "#db2777")
"""Told apart on screen and in print, also by most who see colours differently; lines differ in marker as well."""
MARKERS = "os^Dv<>Ph"
MARKED_MAX = 3
"""Lines whose rate is marked on the axis; of more it stands in the legend alone."""


@dataclass(frozen=True, slots=True)
class Line:
    """`points`: (rate, share that met the limits). `thin`: one that stands beside."""

    label: str
    points: Sequence[tuple[float, float]]
    thin: bool = False


def draw(runs: Sequence[Mapping[str, Any]], slo: Slo, share: float, path: str) -> None:
    """Of one server: what met all limits, and each limit beside. Raises OSError."""
    kinds = {"joint": "all limits", "ttft": "TTFT alone", "tbt": "TBT alone", "joint_mean": "TTFT and mean TPOT"}
    wanted = {"ttft": slo.ttft_s, "tbt": slo.tbt_s, "joint_mean": slo.tpot_s, "joint": True}
    lines = [
        Line(label, [(run["rate_rps"], run["attainment"][kind]) for run in runs], kind != "joint")
        for kind, label in kinds.items()
        if wanted[kind] is not None
    ]
    limits = {"TTFT": slo.ttft_s, "TBT": slo.tbt_s, "mean TPOT": slo.tpot_s}
    given = [f"{name} ≤ {limit * 1e3:.4g} ms" for name, limit in limits.items() if limit is not None]
    draw_lines(lines, "Requests within their limits", ", ".join(given), share, path)


def draw_lines(lines: Sequence[Line], title: str, subtitle: str, share: float, path: str) -> None:
    """One curve per line, the rate at which `share` is attained marked on those that are not thin. Raises OSError."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(8.0, 4.8), dpi=160, layout="constrained")
    axes = figure.subplots()
    axes.axhline(share, color=FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    crowded = sum(not line.thin for line in lines) > MARKED_MAX
    highest = max((rate for line in lines for rate, _ in line.points), default=1.0)
    for line, colour, marker in zip(lines, _cycle(COLOURS, len(lines)), _cycle(MARKERS, len(lines)), strict=True):
        points = sorted(line.points)
        found = None if line.thin else rate_at(points, share)
        label = line.label if found is None else f"{line.label} · {share:.0%} up to {found:.3g}/s"
        width, size, alpha = (1.3, 3.5, 0.75) if line.thin else (2.2, 5.5, 1.0)
        style: dict[str, Any] = {"linewidth": width, "markersize": size, "alpha": alpha, "zorder": 2 if line.thin else 3}
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, label=label, **style)
        if found is not None and found < highest and not crowded:
            axes.plot([found, found], [0, share], color=colour, linewidth=1, linestyle=":", zorder=2)
    axes.set_xlim(0, highest * 1.03)
    axes.set_ylim(0, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("offered load, requests per second", color=INK)
    axes.set_ylabel("requests that met their limits", color=INK)
    axes.set_title(title, loc="left", pad=24, color=INK, fontsize=13, fontweight="bold")
    axes.text(0, 1.025, subtitle, transform=axes.transAxes, color=FAINT, fontsize=9)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9)
    axes.legend(loc="lower left", frameon=True, framealpha=0.9, edgecolor="none", fontsize=9)
    figure.savefig(path)


def _cycle(values: Sequence[str], count: int) -> list[str]:
    return [values[number % len(values)] for number in range(count)]
