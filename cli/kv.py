"""`tandem kv`: look into the KV plane, and tidy it."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.kv_pins import pin, unpin
from cli.kv_prompt import prompt_keys, prompt_text
from cli.kv_table import Admin, Grpc, Json, Node, span, table
from tandem.errors import InvalidRequestError, NotFoundError

if TYPE_CHECKING:
    from cli.kv_nodes import KvNodeAddress

POLL_S = 0.1
TIERS = ("dram", "disk")  # by their number

kv = typer.Typer(no_args_is_help=True, help="Look into the KV plane: who holds which blocks, and whether they are whole.")
kv.command()(pin)
kv.command()(unpin)


@kv.command()
def stat(as_json: Json = False, node: Node = None, grpc: Grpc = None, admin: Admin = None) -> None:
    """Show what every node holds, by tier, and how often it had what was asked for."""
    from cli import kv_nodes as calls

    rows = [_stat(one, calls.stat(one)) for one in calls.find_nodes(grpc, admin, node)]
    if as_json:
        typer.echo(json.dumps({"nodes": rows}, indent=2))
        return
    lines = [
        (
            row["id"] if place == 0 else "",
            tier["tier"],
            f"{tier['blocks']}/{tier['blocks_max']}",
            f"{tier['bytes'] / 2**20:.1f}",
            _percent(tier["hits"], tier["hits"] + tier["misses"]),
            str(tier["evictions"]),
            f"{tier['pinned']}/{tier['pinned_max']}" if tier["pinned_max"] else "",
            str(row["leases_open"]) if place == 0 else "",
            str(row["digest_failures"]) if place == 0 else "",
            row["policy"] if place == 0 else "",
        )
        for row in rows
        for place, tier in enumerate(row["tiers"] or [_NO_TIER])
    ]
    table("node", "tier", "#blocks", "#MiB", "#hit", "#evicted", "#pinned", "#leases", "#bad", "policy", rows=lines)


@kv.command("ls")
def ls(
    limit: Annotated[int, typer.Option(min=0, help="At most so many blocks of each node; 0: all.")] = 50,
    as_json: Json = False,
    node: Node = None,
    grpc: Grpc = None,
    admin: Admin = None,
) -> None:
    """List blocks by key: how old they are, and since when nobody uses them."""
    from cli import kv_nodes as calls

    found = [_entry(one, entry) for one in calls.find_nodes(grpc, admin, node) for entry in calls.entries(one, limit)]
    if as_json:
        typer.echo(json.dumps({"blocks": found}, indent=2))
        return
    lines = [
        (
            e["key"],
            e["node"],
            e["tier"],
            e["bytes"],
            e["hits"],
            span(e["age_s"]),
            span(e["idle_s"]),
            e["tenant"],
            "yes" if e["pinned"] else "",
        )
        for e in found
    ]
    table("key", "node", "tier", "#bytes", "#hits", "#age", "#idle", "tenant", "pinned", rows=lines)


@kv.command()
def get(
    key: Annotated[str, typer.Argument(help="A block's key, 32 hexadecimal digits.")],
    out: Annotated[Path | None, typer.Option(help="Write the block's bytes to this file.")] = None,
    as_json: Json = False,
    node: Node = None,
    grpc: Grpc = None,
    admin: Admin = None,
) -> None:
    """Fetch one block from the first node that has it, and check its digest."""
    from cli import kv_nodes as calls

    wanted = calls.parse_key(key)
    for one in calls.find_nodes(grpc, admin, node):
        if (found := calls.get(one, wanted)) is not None:
            break
    else:
        raise NotFoundError(f"no node has the block {key}; `tandem kv ls` lists those that are there")
    if out is not None:
        try:
            out.write_bytes(found.data)
        except OSError as error:
            raise InvalidRequestError(f"cannot write {out}: {error.strerror}") from None
    shape = {"key": key, "node": found.node, "bytes": len(found.data), "digest": f"{found.record.digest:016x}"}
    typer.echo(json.dumps(shape) if as_json else f"{shape['bytes']} bytes from {found.node}, digest {shape['digest']}")


@kv.command()
def verify(as_json: Json = False, node: Node = None, grpc: Grpc = None, admin: Admin = None) -> None:
    """Read every block against its digest; those that fail are dropped. Exit status 1 when there were any."""
    from cli import kv_nodes as calls

    rows = []
    for one in calls.find_nodes(grpc, admin, node):
        reply = calls.verify(one, ())
        rows.append({"id": one.worker_id, "checked": reply.checked, "dropped": reply.dropped})
    if as_json:
        typer.echo(json.dumps({"nodes": rows}, indent=2))
    else:
        lines = [(row["id"], row["checked"], row["dropped"]) for row in rows]
        table("node", "#checked", "#dropped", rows=lines)
    if any(row["dropped"] for row in rows):
        raise typer.Exit(1)


@kv.command()
def evict(
    keys: Annotated[list[str] | None, typer.Argument(help="Keys of blocks, 32 hexadecimal digits each.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every block that nobody holds.")] = False,
    as_json: Json = False,
    node: Node = None,
    grpc: Grpc = None,
    admin: Admin = None,
) -> None:
    """Drop blocks from memory and disk. What is held or pinned stays."""
    from cli import kv_nodes as calls

    if bool(keys) == everything:
        raise InvalidRequestError("name the keys to evict, or say --all")
    wanted = None if everything else [calls.parse_key(key) for key in keys or ()]
    rows = [{"id": one.worker_id, "evicted": calls.evict(one, wanted)} for one in calls.find_nodes(grpc, admin, node)]
    if as_json:
        typer.echo(json.dumps({"nodes": rows}, indent=2))
    else:
        table("node", "#evicted", rows=[(row["id"], row["evicted"]) for row in rows])


@kv.command()
def warm(
    prompt_file: Annotated[Path, typer.Argument(help="A file with the prompt; - reads it from standard input.")],
    wait: Annotated[float, typer.Option(min=0.0, help="Seconds to wait until a store has all of it.")] = 10.0,
    as_json: Json = False,
    grpc: Grpc = None,
    admin: Admin = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds until the request is given up.")] = 600.0,
) -> None:
    """Compute a prompt's KV now, so that requests that begin with it find it; say how much of it a store then holds."""
    from cli import admin as admin_calls
    from cli import kv_nodes as calls
    from cli.running import admin_address, grpc_address
    from core.request import WorkerRole
    from tandem import Client, SamplingParams

    text = prompt_text(prompt_file)
    snapshot = admin_calls.status(admin_address(grpc, admin))
    keys = prompt_keys(snapshot, text)
    with Client(grpc_address(grpc), timeout_s=timeout) as client:
        result = client.generate(text, SamplingParams(max_tokens=1, temperature=0.0))
    stores = [one for one in calls.nodes_of(snapshot) if one.role is WorkerRole.STORE]
    held = asyncio.run(_wait_for(stores, keys, wait))
    shape = {"prompt_tokens": result.usage.prompt_tokens, "blocks": len(keys), "stored": held, "ttft_s": result.timing.ttft_s}
    if as_json:
        typer.echo(json.dumps(shape))
    else:
        where = f"{held} of its {len(keys)} full blocks are in the store" if stores else "this cluster has no store"
        typer.echo(f"{shape['prompt_tokens']} tokens computed; {where}")


async def _wait_for(stores: list[KvNodeAddress], keys: list[bytes], wait_s: float) -> int:
    """Blocks in the store that has most of them, once it has all or the time is over: workers offer behind their steps."""
    from cli import kv_nodes as calls

    deadline = time.monotonic() + wait_s
    while True:
        held = max([await asyncio.to_thread(calls.holds, one, keys) for one in stores], default=0)
        if held >= len(keys) or not stores or time.monotonic() >= deadline:
            return held
        await asyncio.sleep(POLL_S)


def _stat(node: KvNodeAddress, reply: Any) -> dict[str, Any]:
    return {
        "id": node.worker_id,
        "role": node.role.value,
        "epoch": reply.epoch,
        "policy": reply.policy,
        "leases_open": reply.leases_open,
        "digest_failures": reply.digest_failures,
        "block_size": reply.layout.block_size,
        "fingerprint": reply.layout.fingerprint.hex(),
        "tiers": [{"tier": TIERS[tier.tier], **{name: getattr(tier, name) for name in _COUNTS}} for tier in reply.tiers],
    }


_COUNTS = ("blocks", "blocks_max", "bytes", "hits", "misses", "evictions", "pinned", "pinned_max")
_NO_TIER = {"tier": "empty", **dict.fromkeys(_COUNTS, 0)}


def _entry(node: KvNodeAddress, entry: Any) -> dict[str, Any]:
    return {
        "key": entry.key.hex(),
        "node": node.worker_id,
        "tier": TIERS[entry.tier],
        "bytes": entry.bytes,
        "hits": entry.hits,
        "tenant": entry.tenant.hex(),
        "pinned": entry.pinned,
        "digest": f"{entry.digest:016x}",
        "age_s": entry.age_s,
        "idle_s": entry.idle_s if entry.HasField("idle_s") else None,
        "cost_s": entry.cost_s,
    }


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else ""
