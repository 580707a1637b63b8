"""`tandem plan`: how many workers of which kind to buy."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from cluster.planner import Plan
    from cluster.planner_nearest import Nearest
    from cluster.planner_offers import Attainment, Workload
    from core.request import Slo


def plan(
    slo_ttft: Annotated[float, typer.Option(min=1e-6, metavar="S", help="Limit of the time to the first token, in seconds.")],
    slo_tbt: Annotated[
        float, typer.Option(min=1e-6, metavar="S", help="Limit of the mean of a request's slowest tenth of token gaps.")
    ],
    trace: Annotated[str, typer.Option(metavar="FILE", help="The demand: arrivals and lengths.")],
    gpus: Annotated[str, typer.Option(metavar="FILE", help="What can be had, at what price, how fast: docs/planning.md.")],
    as_json: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write it here; - prints it.")] = None,
    rate: Annotated[
        float | None, typer.Option(min=1e-6, metavar="R", help="Requests per second to plan for; default: the trace's.")
    ] = None,
    output_tokens: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Of each answer, for a trace that does not say.")
    ] = None,
    share: Annotated[float, typer.Option(min=0.01, max=0.999, help="Of requests that must meet both limits.")] = 0.9,
    quick: Annotated[bool, typer.Option("--quick", help="By closed forms alone, in seconds; else by simulation.")] = False,
    policy: Annotated[str, typer.Option(metavar="NAME", help="Of placement, in the simulation.")] = "goodput",
    window: Annotated[float, typer.Option(min=1.0, metavar="S", help="Of demand in each simulation, virtual time.")] = 60.0,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Parts of the trace that goodput is found on.")] = 3,
    plots: Annotated[
        str | None, typer.Option("--plots", metavar="DIR", help="Write pictures there: cost and goodput, the split of pools.")
    ] = None,
) -> None:
    """The cheapest pools that serve the demand within its limits, and the goodput they reach.

    Split or colocated, every GPU and layout of the file, on demand and spot. Exit status 1 when the limits cannot be met: the
    report says which one binds and names the nearest that can.
    """
    from dataclasses import replace

    from cli.written import check_writable
    from cluster.planner_file import read_offers
    from cluster.planner_model import Arriving
    from cluster.planner_offers import Workload
    from core.request import Slo
    from router.policies import make_policy
    from sim.trace_arrivals import Missing, arrivals_of

    make_policy(policy)
    check_writable(as_json)
    slo = Slo(ttft_s=slo_ttft, tbt_s=slo_tbt)
    offers, left_out = read_offers(gpus)
    arrivals = list(arrivals_of(trace, Missing(rate, output_tokens=output_tokens)))
    workload = Workload.of([Arriving(one.arrival_s, one.input_tokens, one.output_tokens) for one in arrivals])
    if rate is not None:
        workload = replace(workload, rate_rps=rate)
    found = _search(workload, offers, slo, arrivals, share, None if quick else policy, window, seeds)
    report = _report(found, workload, slo, share, quick, seeds, left_out)
    if found is None:
        from cluster.planner_nearest import nearest

        report |= _nearest(nearest(workload, offers, slo, share, workload.rate_rps))
    _write(report, as_json)
    if plots is not None and found is not None:
        from cli.plan_plots import write_plots

        for path in write_plots(plots, found.pools, workload, offers, slo, share):
            sys.stderr.write(f"tandem: wrote {path}\n")
    if not report["meets_slo"]:
        from cli.app import FAILED

        sys.stderr.write(f"tandem: {_refusal(report)}\n")
        raise typer.Exit(FAILED)


def _search(
    workload: Workload,
    offers: Any,
    slo: Slo,
    arrivals: Any,
    share: float,
    policy: str | None,
    window_s: float,
    seeds: int,
) -> Plan | None:
    import tempfile
    from pathlib import Path

    from cli.plan_judge import Simulated
    from cli.plan_progress import PlanProgress
    from cluster.planner import Settings, plan

    settings = Settings(share=share, seeds=tuple(range(seeds)))
    with (
        tempfile.TemporaryDirectory(prefix="tandem-plan-") as folder,
        PlanProgress(policy is not None, sys.stderr.isatty()) as progress,
    ):
        judge = None
        if policy is not None:
            judge = Simulated(arrivals, workload.rate_rps, window_s, slo, policy, Path(folder))
            judge.on_progress = progress.tick
        return plan(workload, offers, slo, judge, settings, progress.begin)


def _report(
    found: Plan | None, workload: Workload, slo: Slo, share: float, quick: bool, seeds: int, left_out: list[str]
) -> dict[str, Any]:
    asked = {
        "demand_rps": workload.rate_rps,
        "slo": {"ttft_s": slo.ttft_s, "tbt_s": slo.tbt_s, "share": share},
        "judged_by": "closed forms" if quick else "simulation",
        "left_out": left_out,
        "nearest": None,
    }
    if found is None:
        nothing = {"pools": [], "goodput_rps": 0.0, "goodput_rps_per_gpu": 0.0, "cost_usd_per_hour": 0.0}
        return nothing | {"goodput_requests_per_usd": None, "gpus": 0, "confidence": None, "meets_slo": False} | asked
    per_usd = found.per_usd
    intervals = {"goodput_rps": found.goodput_rps, "goodput_rps_per_gpu": found.per_gpu, "goodput_requests_per_usd": per_usd}
    return {
        "pools": [pool.to_json() for pool in found.pools],
        "goodput_rps": found.goodput_rps.mean,
        "goodput_rps_per_gpu": found.per_gpu.mean,
        "goodput_requests_per_usd": per_usd.mean if per_usd is not None else None,
        "cost_usd_per_hour": found.usd_per_hour,
        "gpus": found.gpus,
        "binding_limit": found.binding,
        "confidence": {"level": 0.95, "seeds": seeds}
        | {name: [each.low, each.high] for name, each in intervals.items() if each is not None},
        "meets_slo": found.meets,
        "attainment": _shares(found.attained),
    } | asked


def _shares(attained: Attainment) -> dict[str, float]:
    return {"joint": attained.joint, "ttft": attained.ttft, "tbt": attained.tbt, "memory": attained.held}


def _nearest(near: Nearest) -> dict[str, Any]:
    if not near.pools:
        return {"binding_limit": near.binding}
    limits = {"slo_ttft_s": near.slo.ttft_s, "slo_tbt_s": near.slo.tbt_s, "rate_rps": near.rate_rps}
    return {"binding_limit": near.binding, "nearest": limits | {"pools": [pool.to_json() for pool in near.pools]}}


def _refusal(report: dict[str, Any]) -> str:
    near, limit = report["nearest"], report["binding_limit"]
    if near is not None:
        return (
            f"no pools meet these limits: {limit} binds; the nearest within which {near['rate_rps']:.3g} requests/s can be "
            f"served are --slo-ttft {near['slo_ttft_s']:.4g} --slo-tbt {near['slo_tbt_s']:.4g}"
        )
    if not report["pools"]:
        return f"no pools can serve this demand: {limit} binds; give larger GPUs, or more of them per replica (tp)"
    return (
        f"the demand of {report['demand_rps']:.3g} requests/s is more than can be served within these limits: {limit}; "
        f"the pools above reach {report['goodput_rps']:.3g}"
    )


def _write(report: dict[str, Any], path: str | None) -> None:
    import json

    from cli.written import write_text

    text = json.dumps(report, indent=2) + "\n"
    if path == "-":
        typer.echo(text, nl=False)
        return
    if path:
        write_text(path, text)
    _show(report)


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for line in report["left_out"]:
        console.print(f"[dim]left out: {line}[/]", highlight=False)
    pools = report["pools"] or (report["nearest"] or {}).get("pools", [])
    if not pools:
        return
    title = f"for {report['demand_rps']:.3g} requests/s" if report["pools"] else "under the nearest limits"
    table = Table(title=title, title_justify="left")
    for name, justify in (("role", "left"), ("GPU", "left"), ("tp", "right"), ("pp", "right"), ("replicas", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_column("market")
    table.add_column("$ / h", justify="right")
    for pool in pools:
        numbers = (str(pool[name]) for name in ("role", "gpu", "tp", "pp", "replicas"))
        table.add_row(*numbers, pool["market"].replace("_", " "), f"{pool['usd_per_hour']:.2f}")
    console.print(table)
    if report["pools"]:
        low, high = report["confidence"]["goodput_rps"]
        per_usd = report["goodput_requests_per_usd"]
        between = f" (95 %: {low:.3g} to {high:.3g})" if low < high else ""
        console.print(
            f"goodput {report['goodput_rps']:.3g} requests/s{between}, "
            f"{report['goodput_rps_per_gpu']:.3g} per GPU ({report['gpus']} of them)"
            + (f", {per_usd:.0f} requests per dollar" if per_usd is not None else "")
            + f" · {report['attainment']['joint']:.1%} of the demand meet both limits"
            + f" · first to break: {report['binding_limit']}",
            highlight=False,
        )
