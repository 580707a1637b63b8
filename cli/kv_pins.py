"""`tandem kv pin` and `unpin`: blocks that a node keeps in memory, whatever else wants the room."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.kv_prompt import prompt_keys, prompt_text
from cli.kv_table import Admin, Grpc, Json, Node, table
from tandem.errors import InvalidRequestError, NotFoundError

Prompt = Annotated[Path | None, typer.Argument(help="A file with the prompt; - reads it from standard input.")]
Keys = Annotated[list[str] | None, typer.Option("--key", help="A block's key, 32 hexadecimal digits; as often as wanted.")]


def pin(
    prompt_file: Prompt = None,
    keys: Keys = None,
    as_json: Json = False,
    node: Node = None,
    grpc: Grpc = None,
    admin: Admin = None,
) -> None:
    """Keep a prompt's blocks, or those of the keys, in the memory of the stores (or of --node) until they are unpinned.

    What is on disk is brought up. What nobody computed yet is not pinned: `tandem kv warm` first. A node pins at most
    store.pinned_share of its blocks, and of what goes beyond it nothing. Pins end with the node.
    """
    from cli import kv_nodes as calls

    nodes, wanted = _targets(prompt_file, keys, node, grpc, admin)
    rows = [_row(one, calls.pin(one, wanted)) for one in nodes]
    _show(rows, "pinned", len(wanted), as_json)
    if not any(row["pinned"] for row in rows):
        raise NotFoundError("none of these blocks is there; compute them with `tandem kv warm PROMPT_FILE`, then pin")


def unpin(
    prompt_file: Prompt = None,
    keys: Keys = None,
    everything: Annotated[bool, typer.Option("--all", help="Whatever is pinned.")] = False,
    as_json: Json = False,
    node: Node = None,
    grpc: Grpc = None,
    admin: Admin = None,
) -> None:
    """Let blocks be evicted again: a prompt's, those of the keys, or all. They stay until room is wanted."""
    from cli import kv_nodes as calls

    if everything:
        if prompt_file is not None or keys:
            raise InvalidRequestError("say --all, or what to unpin, not both")
        rows = [_row(one, calls.unpin(one, None)) for one in calls.find_nodes(grpc, admin, node)]
        _show(rows, "unpinned", None, as_json)
        return
    nodes, wanted = _targets(prompt_file, keys, node, grpc, admin)
    _show([_row(one, calls.unpin(one, wanted)) for one in nodes], "unpinned", len(wanted), as_json)


def _targets(
    prompt_file: Path | None, keys: list[str] | None, node: str | None, grpc: str | None, admin: str | None
) -> tuple[list[Any], list[bytes]]:
    """Where, and which keys: a prompt's in its order."""
    from cli import admin as admin_calls
    from cli import kv_nodes as calls
    from cli.running import admin_address
    from core.request import WorkerRole

    if (prompt_file is None) == (not keys):
        raise InvalidRequestError("name a file with a prompt, or keys with --key")
    snapshot = admin_calls.status(admin_address(grpc, admin))
    nodes = [one for one in calls.nodes_of(snapshot, node) if node is not None or one.role is WorkerRole.STORE]
    if not nodes:
        raise NotFoundError("this cluster has no store that is ready; name a worker with --node, or set store.nodes")
    if prompt_file is None:
        return nodes, [calls.parse_key(key) for key in keys or ()]
    wanted = prompt_keys(snapshot, prompt_text(prompt_file))
    if not wanted:
        raise InvalidRequestError("the prompt fills no block: a pin keeps full blocks alone")
    return nodes, wanted


def _row(node: Any, counts: tuple[int, int, int]) -> dict[str, Any]:
    pinned, pinned_blocks, pinned_max = counts
    return {"id": node.worker_id, "pinned": pinned, "pinned_blocks": pinned_blocks, "pinned_max": pinned_max}


def _show(rows: list[dict[str, Any]], done: str, blocks: int | None, as_json: bool) -> None:
    if as_json:
        wanted = {} if blocks is None else {"blocks": blocks}
        typer.echo(json.dumps({**wanted, "nodes": rows}, indent=2))
        return
    of = "" if blocks is None else f" of {blocks}"
    lines = [(row["id"], f"{row['pinned']}{of}", f"{row['pinned_blocks']}/{row['pinned_max']}") for row in rows]
    table("node", f"#{done}", "#pinned in all", rows=lines)
