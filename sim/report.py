"""What a simulation found, as one page of HTML that needs nothing beside it."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from core.config import Config
from core.errors import ConfigError
from sim.cluster import pools_of
from sim.report_timeline import Timeline

LATENCIES = {
    "ttft_s": "time to first token",
    "tbt_s": "slowest tenth of gaps (TBT)",
    "tpot_s": "mean gap of a request (TPOT)",
    "itl_s": "gap between two tokens",
    "e2e_s": "whole request",
}
LIMITS = {"joint": "TTFT and TBT", "ttft": "TTFT", "tbt": "TBT", "joint_mean": "TTFT and mean TPOT"}
COLUMNS = ("p50", "p90", "p99", "mean")


def write_html(path: str, report: Mapping[str, Any], errors: Mapping[str, int], config: Config, timeline: Timeline) -> None:
    """Raises ConfigError when the file cannot be written, or the pictures not be drawn."""
    text = page(report, errors, config, _pictures(timeline))
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None


def _pictures(timeline: Timeline) -> str:
    try:
        from sim.report_plots import svg, timelines

        return svg(timelines(timeline)) if timeline.samples else ""
    except ImportError:
        raise ConfigError("pictures need matplotlib: install tandem[plot]") from None


def page(report: Mapping[str, Any], errors: Mapping[str, int], config: Config, pictures: str) -> str:
    """`report`: of `sim.run`. `pictures`: HTML, as it is; everything else is escaped."""
    return _PAGE.format(
        title=escape(f"{report['requests']} requests, policy {report['policy']}"),
        sentence=escape(_sentence(report)),
        tiles="".join(_tile(*each) for each in _figures(report)),
        bars="".join(_bar(text, report["attainment"][key]) for key, text in LIMITS.items()),
        latencies="".join(_latency(report, key, text, _limit(config, key)) for key, text in LATENCIES.items()),
        pools="".join(_row(*each) for each in _pools(config)),
        errors="".join(_row(code, str(count)) for code, count in errors.items()) or _row("none", "0"),
        pictures=pictures,
        foot=escape(
            f"seed {report['seed']} · {report['events']} events in {report['wall_s']:.1f} s ·"
            f" {report['duration_s']:.0f} s of virtual time"
        ),
    )


def _sentence(report: Mapping[str, Any]) -> str:
    met, lost = report["attainment"]["joint"], report["rejected"] + report["failed"]
    ended = "all were completed" if not lost else f"{report['rejected']} were rejected, {report['failed']} failed"
    return f"{met:.1%} of {report['requests']} requests were within their limits of TTFT and TBT; {ended}."


def _figures(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    goodput = f"{report['goodput_rps']:.3g}"
    found = [
        (goodput, "goodput, requests/s", f"{report['goodput_mean_rps']:.3g} by mean TPOT"),
        (f"{report['goodput_rps_per_gpu']:.3g}", "goodput per GPU", f"{report['gpus']} GPUs"),
        (f"{report['output_tokens_per_s']:,.0f}", "output tokens/s", f"{report['completed']} requests completed"),
        (f"{report['prefix_hit_ratio']:.1%}", "of prompt tokens cached", f"{report.get('failovers', 0)} failovers"),
    ]
    if plane := report.get("kv_plane"):
        found.append((f"{plane['fetched_blocks']:,}", "blocks fetched", f"{plane['fetched_from_stores']:,} from stores"))
    if report["cost_usd"]:
        per_dollar = report["attainment"]["joint"] * report["requests"] / report["cost_usd"]
        found.append((f"${report['cost_usd']:,.2f}", "cost of the run", f"{per_dollar:,.0f} requests in time per dollar"))
    return found


def _pools(config: Config) -> list[tuple[str, ...]]:
    return [
        (
            pool.role,
            f"{pool.count} x {pool.gpus} GPU",
            pool.gpu or "—",
            str(pool.max_step_tokens or config.engine.max_step_tokens),
        )
        for pool in pools_of(config)
    ]


def _limit(config: Config, key: str) -> float | None:
    value: float | None = getattr(config.sim.slo, key, None)
    return value


def _tile(value: str, what: str, beside: str) -> str:
    return f"<div class=tile><b>{escape(value)}</b><span>{escape(what)}</span><small>{escape(beside)}</small></div>"


def _bar(text: str, share: float) -> str:
    kind = "good" if share >= 0.9 else "bad"
    return (
        f"<div class=bar><span>{escape(text)}</span><i><em class={kind} style='width:{share * 100:.2f}%'></em></i>"
        f"<b>{share:.1%}</b></div>"
    )


def _latency(report: Mapping[str, Any], key: str, text: str, limit_s: float | None) -> str:
    cells = []
    for column in COLUMNS:
        value = report[key][column]
        over = limit_s is not None and value is not None and value > limit_s
        cells.append(f"<td{' class=over' if over else ''}>{'—' if value is None else f'{value * 1e3:,.1f}'}</td>")
    limit = "" if limit_s is None else f"{limit_s * 1e3:,.1f}"
    return f"<tr><th>{escape(text)}</th>{''.join(cells)}<td class=faint>{limit}</td></tr>"


def _row(*cells: str) -> str:
    first, *others = map(escape, cells)
    return f"<tr><th>{first}</th>{''.join(f'<td>{cell}</td>' for cell in others)}</tr>"


_PAGE = """<!doctype html>
<html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">
<title>tandem sim: {title}</title>
<style>
 body {{ font: 15px/1.5 system-ui, sans-serif; color: #1f2933; background: #f5f7fa; margin: 0; }}
 main {{ max-width: 960px; margin: 0 auto; padding: 32px 20px 48px; }}
 h1 {{ font-size: 26px; margin: 0; }} h2 {{ font-size: 16px; margin: 0 0 10px; }} p {{ margin: 4px 0 20px; color: #52606d; }}
 .tiles {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(138px, 1fr)); gap: 12px; margin-bottom: 16px; }}
 .tile, section {{ background: #fff; border: 1px solid #e4e7eb; border-radius: 10px; padding: 14px 16px; }}
 .tile b {{ font-size: 26px; display: block; line-height: 1.2; }} .tile span {{ display: block; }}
 .tile small, .faint, footer {{ color: #7b8794; }} section {{ margin-bottom: 16px; overflow-x: auto; }}
 .bar {{ display: grid; grid-template-columns: minmax(90px, 170px) 1fr 60px; gap: 12px; align-items: center; margin: 4px 0; }}
 .bar i {{ background: #e4e7eb; border-radius: 5px; height: 12px; overflow: hidden; position: relative; }}
 .bar i::after {{ content: ""; position: absolute; left: 90%; top: 0; bottom: 0; width: 2px; background: #1f2933; }}
 .bar em {{ display: block; height: 100%; }}
 .good {{ background: #15803d; }} .bad {{ background: #c2410c; }} .bar b {{ text-align: right; }}
 table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
 th {{ text-align: left; font-weight: 500; }} td {{ text-align: right; }}
 th, td {{ padding: 4px 8px; border-top: 1px solid #e4e7eb; }}
 thead td, thead th {{ border: 0; color: #7b8794; font-size: 13px; }} .over {{ color: #c2410c; font-weight: 600; }}
 .two {{ display: grid; grid-template-columns: 3fr 2fr; gap: 16px; }} svg {{ width: 100%; height: auto; }}
 @media (max-width: 700px) {{ .two {{ grid-template-columns: 1fr; }} th, td {{ padding: 4px 3px; font-size: 12px; }} }}
</style>
<main>
<h1>{title}</h1><p>{sentence}</p>
<div class=tiles>{tiles}</div>
<section><h2>Within limits (the mark is 90 %)</h2>{bars}</section>
<section><h2>Latency</h2><table>
<thead><tr><th>milliseconds</th><td>p50</td><td>p90</td><td>p99</td><td>mean</td><td>limit</td></tr></thead>
{latencies}</table></section>
<section><h2>Over time</h2>{pictures}</section>
<div class=two>
<section><h2>Pools</h2><table>
<thead><tr><th>role</th><td>workers</td><td>GPU</td><td>tokens a step</td></tr></thead>
{pools}</table></section>
<section><h2>Errors</h2><table>{errors}</table></section>
</div>
<footer>{foot}</footer>
</main></html>
"""
