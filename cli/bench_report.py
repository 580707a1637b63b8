"""What a benchmark found: a table, JSON, a picture."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import typer

from cli.bench_run import Measured
from core.errors import ConfigError
from core.latency import Outcome, RequestTrace, rate_at, summarize
from core.request import Slo

SHARE = 0.9
"""Of requests, that should meet their limits."""
_LABELS = {
    "ttft_s": "time to first token",
    "itl_s": "gap between tokens",
    "tpot_s": "mean gap of a request",
    "tbt_s": "slowest tenth of gaps",
    "e2e_s": "whole request",
}


class Report:
    """One run gives one report, several give `{"runs": [report…], "rate_rps_at_90": …}`; each says the `rate_rps` offered."""

    def __init__(self, slo: Slo, plot: str | None = None) -> None:
        self._slo, self._plot = slo, plot
        self._runs: list[tuple[dict[str, Any], list[RequestTrace]]] = []

    def add(self, measured: Measured) -> None:
        summary = summarize(measured.traces, self._slo, measured.took_s) | {"rate_rps": measured.rate}
        self._runs.append((summary, measured.traces))

    @property
    def tree(self) -> dict[str, Any]:
        reports = [report for report, _ in self._runs]
        if len(reports) == 1:
            return reports[0]
        points = [(report["rate_rps"], report["attainment"]["joint"]) for report in reports]
        return {"runs": reports, "rate_rps_at_90": rate_at(points, SHARE)}

    @property
    def nothing_served(self) -> str:
        """Why no request of any run was answered; empty when one was."""
        traces = [trace for _, found in self._runs for trace in found]
        if any(trace.outcome is Outcome.COMPLETED for trace in traces):
            return ""
        if not traces:
            return "there was no request to send; give a trace that has some within --duration"
        first = min(traces, key=lambda trace: trace.end_s)
        refused = sum(trace.outcome is Outcome.REJECTED for trace in traces)
        how = "was refused" if refused == len(traces) else "failed" if not refused else f"failed or was refused ({refused})"
        return f"every request {how}, {len(traces)} in all; the first one: {first.error}"

    def write(self, path: str | None) -> None:
        """The JSON to `path` (`-`: standard output, and nothing else there), the table otherwise, and the picture."""
        try:
            if path and path != "-":
                Path(path).write_text(json.dumps(self.tree, indent=2) + "\n")
            if self._plot:
                from cli.attainment_plot import draw

                draw(self.tree["runs"], self._slo, SHARE, self._plot)
        except OSError as error:
            raise ConfigError(f"cannot write {error.filename}: {error.strerror}") from None
        if path == "-":
            typer.echo(json.dumps(self.tree, indent=2))
        elif len(self._runs) == 1:
            _show_one(*self._runs[0])
        else:
            self._show_all()

    def _show_all(self) -> None:
        from rich.console import Console
        from rich.table import Table

        table = Table(title=f"requests within {_limits(self._slo) or 'no limits'}; ms", title_justify="left")
        for name in ("rate /s", "all limits", "TTFT", "TBT", "mean TPOT", "good /s", "TTFT p50", "p99", "TBT p50", "p99"):
            table.add_column(name, justify="right", min_width=max(map(len, name.split())))
        for report, _ in self._runs:
            met = report["attainment"]
            shares = [f"{met[name]:.0%}" for name in ("joint", "ttft", "tbt", "joint_mean")]
            times = [_ms(report[key][name]) for key in ("ttft_s", "tbt_s") for name in ("p50", "p99")]
            table.add_row(f"{report['rate_rps']:.2f}", *shares, f"{report['goodput_rps']:.2f}", *times)
        console = Console()
        console.print(table)
        found = self.tree["rate_rps_at_90"]
        upto = f"up to {found:.2f} requests/s" if found else "at none of these rates"
        console.print(f"{SHARE:.0%} meet all limits {upto}", highlight=False)
        _show_errors(console, [trace for _, traces in self._runs for trace in traces])


def _show_one(report: dict[str, Any], traces: list[RequestTrace]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{report['completed']} of {report['requests']} requests in {report['duration_s']:.1f} s", title_justify="left"
    )
    table.add_column("milliseconds")
    for name in ("p50", "p90", "p99", "mean"):
        table.add_column(name, justify="right")
    for key, label in _LABELS.items():
        table.add_row(label, *(_ms(report[key][name]) for name in ("p50", "p90", "p99", "mean")))
    console = Console()
    console.print(table)
    attained = report["attainment"]
    console.print(
        f"{report['output_tokens_per_s']:.0f} tokens/s · goodput {report['goodput_rps']:.2f} requests/s "
        f"({attained['joint']:.0%} met their limits; by mean TPOT {attained['joint_mean']:.0%})"
    )
    _show_errors(console, traces)


def _show_errors(console: Any, traces: list[RequestTrace]) -> None:
    lost = Counter(trace.outcome for trace in traces)
    if len(traces) > lost[Outcome.COMPLETED]:
        counts = f"{lost[Outcome.FAILED]} failed, {lost[Outcome.REJECTED]} were refused"
        console.print(f"of {len(traces)} requests {counts}", highlight=False)
    for error, count in Counter(trace.error for trace in traces if trace.error).most_common(5):
        console.print(f"[red]{count} ×[/] {error}", highlight=False)


def _limits(slo: Slo) -> str:
    given = {"TTFT": slo.ttft_s, "TBT": slo.tbt_s, "TPOT": slo.tpot_s}
    return ", ".join(f"{name} ≤ {limit * 1e3:g} ms" for name, limit in given.items() if limit is not None)


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1000:.1f}"
