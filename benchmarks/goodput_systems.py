"""The clusters and servers whose goodput is compared, each on both cores."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from benchmarks.clusters import Tandem, Vllm, free_port, tandem, vllm
from benchmarks.rivals import NIXL, prefill_leg
from cli.load import Job, OpenTarget
from cli.targets import Asked, HttpTarget, open_grpc, open_http
from core.config import DEMO_MODEL, Config
from core.hostspec import HostSpec
from core.request import Slo, WorkerRole
from tandem.errors import UnavailableError

TIMEOUT_S = 20.0
"""Far beyond any limit here: such a request has missed it, and what it leaves behind must not reach into the next rate."""
STOP_S = 20.0
STARVED_S = 60.0
"""Where half a dozen processes share two cores, one that says nothing for a while is not dead."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One way to lay a cluster over two cores. `chunk`: of chunked prefill, the tokens of a step."""

    prefill: int
    decode: int
    colocated: int
    chunk: int
    threads: int = 1

    @property
    def name(self) -> str:
        workers = f"{self.colocated} colocated" if self.colocated else f"{self.prefill} prefill + {self.decode} decode"
        return f"{workers}, {self.threads} thread{'s' if self.threads > 1 else ''} each, chunks of {self.chunk}"

    def tree(self, policy: str) -> dict[str, Any]:
        """Its configuration. Without a store: nothing here is asked twice, and offers would cost what is measured."""
        return {
            "model": {"path": DEMO_MODEL, "name": "m"},
            "engine": {"threads": self.threads, "max_step_tokens": self.chunk},
            "cluster": {
                "launcher": "local",
                "prefill": self.prefill,
                "decode": self.decode,
                "colocated": self.colocated,
                "dead_after_s": STARVED_S,
            },
            "router": {"policy": policy},
            "store": {"nodes": 0},
            "log_level": "warning",
        }


@contextmanager
def ours(shape: Shape, policy: str = "goodput") -> Iterator[Tandem]:
    with tandem(config=yaml.safe_dump(shape.tree(policy))) as cluster:
        yield cluster


def grpc_target(address: str, slo: Slo) -> OpenTarget:
    return functools.partial(open_grpc, address, Asked(TIMEOUT_S, slo=slo))


def http_target(address: str, slo: Slo) -> OpenTarget:
    return functools.partial(open_http, address, Asked(TIMEOUT_S, slo=slo), True)


@contextmanager
def router_beside(cluster: Tandem, shape: Shape, policy: str) -> Iterator[str]:
    """Another router of the same workers, with another policy, until the block ends; its gRPC address."""
    tree = shape.tree(policy)
    address = f"127.0.0.1:{free_port()}"
    tree["router"] |= {"grpc": address}
    spec = HostSpec(f"bench-{policy}", WorkerRole.ROUTER, 1, Config.model_validate(tree), cluster.admin)
    command = [sys.executable, "-m", "cluster.host", str(os.getpid())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stdin is not None
        process.stdin.write(spec.to_json() + "\n")
        process.stdin.flush()
        try:
            yield address
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()


@contextmanager
def routers_beside(cluster: Tandem, shape: Shape, policies: list[str]) -> Iterator[dict[str, str]]:
    """Addresses by policy; that of the cluster itself is the first one's."""
    with ExitStack() as stack:
        others = {policy: stack.enter_context(router_beside(cluster, shape, policy)) for policy in policies[1:]}
        yield {policies[0]: cluster.grpc, **others}


# ---- vLLM, combined and split ------------------------------------------------------------------------------------


class SplitVllm:
    """vLLM's own way of splitting: the proxy's part is done here, one call to prefill, then the stream from decode."""

    def __init__(self, prefill: Vllm, decode: HttpTarget, client: httpx.AsyncClient) -> None:
        self._leg = prefill_leg(prefill.url)
        self._decode = decode
        self._client = client
        self.context_max = decode.context_max

    async def answer(self, job: Job) -> AsyncIterator[int]:
        try:
            body = await self._leg(self._client, self._decode.body(job), job.seed)
        except (httpx.HTTPError, KeyError, ValueError) as error:
            raise UnavailableError(f"the prefill server gave no answer: {type(error).__name__} {error}") from None
        async with aclosing(self._decode.stream(body)) as events:
            async for event in events:
                if any(choice.get("text") for choice in event.get("choices", ())):
                    yield 1


@contextmanager
def vllm_combined(chunk: int) -> Iterator[OpenTarget]:
    """Raises RuntimeError when it is not installed or does not start."""
    with vllm(Path(DEMO_MODEL), "float32", "--max-num-batched-tokens", str(chunk)) as server:
        server.wait()
        yield http_target(server.url, Slo())


@contextmanager
def vllm_split(chunk: int) -> Iterator[OpenTarget]:
    """One core each. Raises RuntimeError when it is not installed or does not start."""
    flags = ("--kv-transfer-config", NIXL, "--max-num-batched-tokens", str(chunk))
    side = [{"VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port())} for _ in range(2)]
    with ExitStack() as stack:
        servers = [
            stack.enter_context(vllm(Path(DEMO_MODEL), "float32", *flags, cores=str(core), env=side[core])) for core in range(2)
        ]
        for server in servers:
            server.wait()
        prefill, decode = servers

        @asynccontextmanager
        async def opened() -> AsyncIterator[SplitVllm]:
            async with httpx.AsyncClient(timeout=TIMEOUT_S) as client, http_target(decode.url, Slo())() as target:
                assert isinstance(target, HttpTarget)
                yield SplitVllm(prefill, target, client)

        yield opened
