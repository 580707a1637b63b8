"""`tandem explain`: why a request was placed where it was, what was predicted, and what came of it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from tandem.explanation import Decision, Explanation
    from tandem.results import Placement


def explain(
    request_id: Annotated[str, typer.Argument(help="The request's id; ID/1 is its second choice.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    grpc: Annotated[str | None, typer.Option(help="The cluster's gRPC address; default: the one running here.")] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for the router.")] = 10.0,
) -> None:
    """Say why a request was placed where it was, what was predicted, and what came of it."""
    from cli.running import grpc_address
    from tandem import Client

    with Client(grpc_address(grpc)) as client:
        known = client.explain(request_id, timeout_s=timeout)
    if as_json:
        typer.echo(json.dumps(shape(known), indent=2, ensure_ascii=False))
    else:
        _show(known)


def shape(known: Explanation) -> dict[str, Any]:
    """The JSON form."""
    from dataclasses import asdict

    return asdict(known) | {"errors": errors(known)}


def errors(known: Explanation) -> dict[str, float | None]:
    """(predicted − actual) / actual of the last decision: `{"ttft", "tpot"}`, None where there is nothing to compare."""
    outcome, last = known.outcome, known.decisions[-1]
    if outcome is None or outcome.failovers or last.placement is None or not last.candidates:
        return {"ttft": None, "tpot": None}
    chosen = last.candidates[0]
    actual_s = {"ttft": outcome.timing.ttft_s - last.at_s, "tpot": outcome.timing.tpot_s}
    predicted_s = {"ttft": chosen.ttft_s, "tpot": chosen.tpot_s}
    return {name: predicted_s[name] / actual_s[name] - 1 if actual_s[name] > 0 else None for name in actual_s}


def _show(known: Explanation) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.print(f"[bold]{known.request_id}[/]  {_ended(known)}")
    limits = [
        f"{name} ≤ {_ms(limit)}"
        for name, limit in (("TTFT", known.ttft_slo_s), ("TBT", known.tbt_slo_s), ("TPOT", known.tpot_slo_s))
        if limit is not None
    ]
    console.print(
        f"policy {known.policy}, class {known.slo_class}, {', '.join(limits) or 'no limits'}; "
        f"{known.prompt_tokens} prompt tokens, about {known.output_tokens} expected back"
    )
    if known.forgotten:
        console.print(f"[dim]{known.forgotten} earlier decisions are forgotten[/]")
    for number, decision in enumerate(known.decisions, 1 + known.forgotten):
        where = f"[bold]{_where(decision.placement)}[/]" if decision.placement is not None else "[red]nobody[/]"
        console.print(f"\n{number}. {_ms(decision.at_s)} after it arrived: {where}: {decision.reason}")
        if decision.candidates:
            console.print(_candidates(decision))
    if known.outcome is not None:
        console.print()
        console.print(_predicted_and_actual(known))


def _ended(known: Explanation) -> str:
    outcome = known.outcome
    if outcome is None:
        return "[yellow]still runs[/]"
    colour = "green" if outcome.finish in ("stop", "length") else "red"
    failovers = f", {outcome.failovers} failovers" if outcome.failovers else ""
    message = f": {outcome.message}" if outcome.message else ""
    return f"[{colour}]{outcome.finish}[/] after {outcome.tokens} tokens on {_where(outcome.placement)}{failovers}{message}"


def _candidates(decision: Decision) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("in ms", min_width=12)
    held = any(one.held_s for one in decision.candidates)  # first tokens that wait for the second
    for name in ("TTFT", "overhead", "queue", "prefill", *(["held"] if held else []), "hand-off", "gap", "TPOT"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict")
    for rank, one in enumerate(decision.candidates):
        first = (one.ttft_s, one.overhead_s, one.queue_s, one.prefill_s, *([one.held_s] if held else []))
        parts = (*first, one.transfer_s, one.gap_s, one.tpot_s)
        table.add_row(
            _where(one.placement), *(f"{part * 1e3:.1f}" for part in parts), one.reason, style="" if rank == 0 else "dim"
        )
    return table


def _predicted_and_actual(known: Explanation) -> Table:
    """What the last decision promised, beside what the user got."""
    from rich import box
    from rich.table import Table

    outcome, last = known.outcome, known.decisions[-1]
    assert outcome is not None
    chosen = last.candidates[0] if last.placement is not None and last.candidates else None
    timing, off = outcome.timing, errors(known)
    rows: list[tuple[str, float | None, float, float | None]] = [
        ("until the last decision", None, last.at_s, None),
        ("first token after it", chosen.ttft_s if chosen else None, timing.ttft_s - last.at_s, off["ttft"]),
        ("  of it prefill", chosen.prefill_s if chosen else None, timing.prefill_s, None),
        ("hand-off left over after prefill", chosen.transfer_s if chosen else None, timing.transfer_exposed_s, None),
        ("waited to join the batch", None, timing.handoff_wait_s, None),
        ("mean gap (TPOT)", chosen.tpot_s if chosen else None, timing.tpot_s, off["tpot"]),
        ("whole request", None, timing.total_s, None),
    ]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    for name in ("predicted", "actual", "off by"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, predicted_s, actual_s, error in rows:
        table.add_row(
            name,
            "" if predicted_s is None else _ms(predicted_s),
            _ms(max(actual_s, 0.0)),
            "" if error is None else f"{error:+.0%}",
        )
    return table


def _where(placement: Placement) -> str:
    together = placement.prefill == placement.decode
    return placement.decode or "nowhere" if together else f"{placement.prefill} → {placement.decode}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 10 else f"{seconds:.1f} s"
