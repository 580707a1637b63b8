"""`make demo`: a Ray cluster with one prefill and one decode worker, real completions, and where their time went.

Starts what a user would start (`tandem up`), talks to it as a user would (the gRPC SDK, an OpenAI client), explains what it
shows, and ends it.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from cli.redis_server import redis_server
from tandem import Client, SamplingParams
from tandem.errors import TandemError, UnavailableError

READY_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 60.0
BAR_CHARS = 40
PROMPTS = (
    ("def fibonacci(n):\n", SamplingParams(max_tokens=48, temperature=0.0)),
    ("class Stack:\n    def push(self, item):\n", SamplingParams(max_tokens=48, temperature=0.7, seed=7)),
)
HTTP_PROMPT = 'import json\n\ndef load_config(path):\n    """Reads a JSON file."""\n'
LONG_PROMPT_LINES = 40
console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)


@dataclass(frozen=True, slots=True)
class Shown:
    """One finished request: `timing_s` as `tandem generate --json` names the parts."""

    label: str
    prompt_tokens: int
    completion_tokens: int
    timing_s: dict[str, float]
    prefill: str
    decode: str


def main() -> int:
    began = time.monotonic()
    try:
        with redis_server() as redis, _cluster(redis.url) as (grpc, http):
            _introduce(grpc, http, redis.url, time.monotonic() - began)
            shown = [*_over_grpc(grpc), _over_http(http)]
            _explain(shown)
            console.print("\nEnding the cluster …", style="dim")
    except TandemError as error:
        console.print(f"[red]the demo failed:[/] {error.message}")
        return 1
    except KeyboardInterrupt:
        return 130
    _farewell(time.monotonic() - began)
    return 0


# ---- the cluster -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _cluster(redis_url: str) -> Iterator[tuple[str, str]]:
    """`tandem up` on free ports in a process of its own; yields its gRPC and HTTP addresses."""
    command = [sys.executable, "-m", "cli.main", "up", "--launcher", "ray", "--prefill", "1", "--decode", "1"]
    command += ["--redis", redis_url, "--log-level", "warning"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True)
        try:
            with console.status("Starting Ray, one prefill worker, one decode worker and a router …"):
                line = _line(process)
            if not line.startswith("tandem ready "):
                log.seek(0)
                raise UnavailableError("`tandem up` did not get ready:\n" + log.read()[-4000:])
            addresses = dict(part.split("=", 1) for part in line.split()[2:])
            yield addresses["grpc"], addresses["http"]
        finally:
            _end(process)


def _line(process: subprocess.Popen[str]) -> str:
    """The first line it prints, or nothing when it ends or takes too long."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        return process.stdout.readline() if selector.select(READY_TIMEOUT_S) else ""


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


# ---- requests ----------------------------------------------------------------------------------------------------


def _over_grpc(address: str) -> Iterator[Shown]:
    _headline("gRPC, with Tandem's own client", "for token in Client(address).stream(prompt, SamplingParams(...)): ...")
    with Client(address) as client:
        client.generate("x = 1\n", SamplingParams(max_tokens=4))  # the very first request also warms both engines up
        for prompt, sampling in PROMPTS:
            label = prompt.splitlines()[0]
            yield _stream(client, prompt, sampling, f"{label} ({'greedy' if sampling.temperature == 0 else 'sampled'})")
        yield _long(client)


def _stream(client: Client, prompt: str, sampling: SamplingParams, label: str) -> Shown:
    console.print(Text(prompt, style="bold"), end="")
    with client.stream(prompt, sampling) as stream:
        for token in stream:
            console.print(Text(token.text, style="green"), end="")
        result = stream.result
    console.print("\n")
    return _of_result(label, result)


def _long(client: Client) -> Shown:
    """A prompt of several chunks: its blocks travel while later chunks are still computed."""
    prompt = "".join(f"def function_{n}(a, b):\n    return a * {n} + b\n\n" for n in range(LONG_PROMPT_LINES))
    result = client.generate(prompt, SamplingParams(max_tokens=16, temperature=0.0))
    console.print(f"[dim]… and one long prompt of {result.usage.prompt_tokens} tokens, not shown.[/]\n")
    return _of_result("a long prompt", result)


def _of_result(label: str, result: Any) -> Shown:
    timing = {name.removesuffix("_s"): value for name, value in asdict(result.timing).items()}
    usage, placement = result.usage, result.placement
    return Shown(label, usage.prompt_tokens, usage.completion_tokens, timing, placement.prefill, placement.decode)


def _over_http(address: str) -> Shown:
    _headline("HTTP, with an OpenAI client", "OpenAI(base_url=...).completions.create(..., stream=True)")
    console.print(Text(HTTP_PROMPT, style="bold"), end="")
    last: dict[str, Any] = {}
    for chunk in _chunks(address):
        for choice in chunk.get("choices", ()):
            console.print(Text(choice["text"], style="green"), end="")
        last = chunk
    console.print("\n")
    usage, ours = last["usage"], last["tandem"]
    placement = ours["placement"]
    return Shown(
        "import json … (HTTP)",
        usage["prompt_tokens"],
        usage["completion_tokens"],
        ours["timing_s"],
        placement["prefill"],
        placement["decode"],
    )


def _chunks(address: str) -> Iterator[dict[str, Any]]:
    """Chunks of a streamed completion: with the openai client where it is installed, else with httpx."""
    body: dict[str, Any] = {"model": "demo", "prompt": HTTP_PROMPT, "max_tokens": 48, "temperature": 0.0}
    body["stream_options"] = {"include_usage": True}
    try:
        from openai import OpenAI
    except ImportError:
        yield from _plain_chunks(address, {**body, "stream": True})
        return
    with OpenAI(base_url=f"http://{address}/v1", api_key="unused") as client:
        for chunk in client.completions.create(**body, stream=True):
            yield chunk.model_dump()


def _plain_chunks(address: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    import httpx

    with httpx.stream("POST", f"http://{address}/v1/completions", json=body, timeout=60.0) as answer:
        for line in answer.iter_lines():
            if line.startswith("data:") and line != "data: [DONE]":
                yield json.loads(line[5:])


# ---- words -------------------------------------------------------------------------------------------------------


def _introduce(grpc: str, http: str, redis_url: str, took_s: float) -> None:
    console.print(
        Panel(
            "[bold]Tandem is serving a real model[/], a small Llama trained on Python's own source code, "
            f"{took_s:.0f} s after the start.\n\n"
            "  prefill-0   reads a prompt and computes its attention state, the KV cache\n"
            "  decode-0    gets that cache over shared memory and writes the answer, token by token\n"
            f"  router-0    takes requests at grpc={grpc} and http={http}, and places each on a pair\n"
            f"  redis       a real one, at {redis_url}: who holds which blocks of that cache\n\n"
            "Why split them? Long prompts would make every running answer stutter; on workers of their own they cannot.",
            title="make demo",
            border_style="cyan",
        )
    )


def _headline(what: str, code: str) -> None:
    console.rule(f"[bold cyan]{what}", align="left", style="cyan")
    console.print(Text(code, style="dim"))
    console.print()


_PARTS = (
    ("queue", "queue", "yellow"),
    ("prefill", "prefill", "blue"),
    ("transfer left", "transfer_exposed", "magenta"),
    ("hand-off wait", "handoff_wait", "red"),
    ("first decode", "first_decode", "cyan"),
)


def _explain(shown: list[Shown]) -> None:
    console.rule("[bold cyan]Where the time of each request went", align="left", style="cyan")
    table = Table(caption="milliseconds", caption_justify="right", box=None, pad_edge=False, padding=(0, 1))
    table.add_column("request", no_wrap=True)
    table.add_column("tokens", justify="right", no_wrap=True)
    for name, _, colour in _PARTS:
        table.add_column(Text(name, style=colour), justify="right")
    table.add_column("first token", justify="right", style="bold")
    table.add_column("each next", justify="right", style="bold")
    table.add_column("total", justify="right")
    for request in shown:
        cells = [f"{request.timing_s[key] * 1000:.1f}" for _, key, _ in _PARTS]
        totals = [f"{request.timing_s[key] * 1000:.1f}" for key in ("ttft", "tpot", "total")]
        table.add_row(request.label, f"{request.prompt_tokens} → {request.completion_tokens}", *cells, *totals)
    console.print(table)
    _bars(shown)
    workers = shown[0]
    pulled_ms = max(request.timing_s["transfer"] for request in shown) * 1000
    console.print(
        f"\nEvery prompt was computed on [bold]{workers.prefill}[/] and every answer written on [bold]{workers.decode}[/]. "
        f"The KV cache moved between them while the prompt was still being computed (at most {pulled_ms:.1f} ms of copying "
        "for a request), so little or nothing was [magenta]left to transfer[/] when prefill ended, and the first token never "
        "waits for it."
    )


def _bars(shown: list[Shown]) -> None:
    """Until the second token: each part as a piece of a line, all on one scale."""
    console.print("\n[dim]from the request to its second token:[/]")
    longest = max(sum(request.timing_s[key] for _, key, _ in _PARTS) for request in shown)
    width = max(len(request.label) for request in shown)
    for request in shown:
        line = Text(f"{request.label:<{width}}  ")
        for _, key, colour in _PARTS:
            line.append("█" * round(BAR_CHARS * request.timing_s[key] / longest), style=colour)
        console.print(line)


def _farewell(took_s: float) -> None:
    console.print(
        Panel(
            "[bold]Try next[/]\n\n"
            "  .venv/bin/tandem up                                  a cluster of your own, until Ctrl-C\n"
            '  .venv/bin/tandem generate "def main():"              ask it, from another terminal\n'
            "  .venv/bin/tandem status                              who runs what\n"
            "  .venv/bin/tandem bench --rate 4 --duration 10        load it and see what users would feel\n"
            "  kill -9 a worker's pid while it answers              the text goes on, and the worker is replaced\n"
            "  .venv/bin/tandem up --model PATH_OR_HUB_ID           serve a model of yours",
            title=f"done in {took_s:.0f} s; nothing was left running",
            border_style="cyan",
        )
    )


if __name__ == "__main__":
    sys.exit(main())
