"""`tandem generate`: one prompt, its text as it comes."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tandem.results import Result


def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")],
    max_tokens: Annotated[int | None, typer.Option(help="At most this many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling; 1 is off.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Choose among the k likeliest; 0 is off.")] = 0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Send it as a chat message of the user.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end instead of text.")] = False,
    grpc: Annotated[str | None, typer.Option(help="The cluster's gRPC address; default: the one running here.")] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds until the request is given up.")] = 600.0,
) -> None:
    """Complete a prompt."""
    from cli.running import grpc_address
    from tandem import Client, SamplingParams

    text = sys.stdin.read() if prompt == "-" else prompt
    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    with (
        Client(grpc_address(grpc), timeout_s=timeout) as client,
        client.stream([{"role": "user", "content": text}] if chat else text, sampling) as stream,
    ):
        for token in stream:
            if not as_json:
                sys.stdout.write(token.text)
                sys.stdout.flush()
        result = stream.result
    typer.echo(json.dumps(shape(result), ensure_ascii=False) if as_json else "")


def shape(result: Result) -> dict[str, Any]:
    """The JSON form of a result; lengths of time are in seconds."""
    timing = {name.removesuffix("_s"): value for name, value in asdict(result.timing).items()}
    return {
        "request_id": result.request_id,
        "text": result.text,
        "token_ids": list(result.token_ids),
        "finish_reason": result.finish_reason,
        "usage": asdict(result.usage),
        "timing_s": timing,
        "placement": asdict(result.placement),
        "failovers": result.failovers,
        "seed": result.seed,
    }
