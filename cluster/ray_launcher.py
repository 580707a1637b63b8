"""Hosts as Ray actors. The one file that imports Ray."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from cluster.host import Ended, Host
from cluster.launcher import Handle
from cluster.ray_session import new_session, own_process_groups, probe
from core.config import ClusterConfig, prepare_ray
from core.errors import ConfigError
from core.hostspec import HostSpec
from core.request import WorkerRole

log = logging.getLogger(__name__)

INIT_TIMEOUT_S = 60.0
CALL_TIMEOUT_S = 20.0
PLACE_TIMEOUT_S = 45.0
SHUTDOWN_TIMEOUT_S = 30.0
ACTOR_CPUS = 0.01  # actors share what there is: torch threads are counted by the configuration, not by Ray
T = TypeVar("T")


def resource_of(role: WorkerRole) -> str:
    """A custom resource that an operator may give to Ray nodes; where any node has it, the role runs only there."""
    return f"tandem_{role.value}"


def bundles_of(workers: Mapping[WorkerRole, int], known: Mapping[str, float]) -> list[dict[str, float]]:
    """What Ray is asked for: a bundle per worker, on nodes with its role's resource where any node has it."""
    each = {role: {"CPU": ACTOR_CPUS} | ({resource_of(role): 0.001} if resource_of(role) in known else {}) for role in workers}
    return [each[role] for role, count in workers.items() for _ in range(count)]


class RayLauncher:
    """Starts a Ray of its own that listens on loopback alone, or joins `config.ray_address`.

    Ray is called from one thread that lives as long as the launcher: a local Ray's processes are told to die with the
    thread that started them. `on_started` is called on the loop's thread once Ray runs; Ray has replaced signal
    handlers by then. Actors have `max_restarts=0`; replacing them is the controller's business.
    """

    def __init__(self, config: ClusterConfig, on_started: Callable[[], None] = lambda: None, stores: int = 0) -> None:
        """`stores`: how many store nodes there will be beside the workers."""
        self._config = config
        self._actors = 1 + config.prefill + config.decode + config.colocated + stores
        self._on_started = on_started
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ray")
        self._session: Path | None = None
        self._ray: Any = None
        self._placement: dict[str, float] = {}
        self._started = asyncio.get_running_loop().create_task(self._start(), name="ray start")

    async def launch(self, spec: HostSpec) -> Handle:
        await asyncio.shield(self._started)
        actor, placed = await self._call(CALL_TIMEOUT_S, lambda: self._create(spec))
        try:
            async with asyncio.timeout(PLACE_TIMEOUT_S):
                await asyncio.wrap_future(placed)
        except TimeoutError:
            await self._call(CALL_TIMEOUT_S, lambda: self.kill(actor))
            raise ConfigError(
                f"Ray found no place for {spec.worker_id} within {PLACE_TIMEOUT_S:g} s: it needs {ACTOR_CPUS} CPU"
                + (f" on a node with the resource {role}" if (role := resource_of(spec.role)) in self._placement else "")
            ) from None
        return _Actor(self, actor, asyncio.wrap_future(await self._call(CALL_TIMEOUT_S, lambda: actor.run.remote().future())))

    async def want(self, workers: Mapping[WorkerRole, int]) -> None:
        """Asks the autoscaler of a joined cluster for room for so many workers of each role; a Ray of our own has no more
        machines to give. The request stands until the next one (Ray's `request_resources`)."""
        if not self._config.ray_address:
            return
        try:
            await self._call(CALL_TIMEOUT_S, lambda: self._request(workers))
        except Exception as error:  # Ray's own tree: without an autoscaler the workers wait for a place as before
            log.warning("Ray could not be asked for machines: %s", _first_line(error))

    async def close(self) -> None:
        """Ends Ray when it is ours, else only leaves it. Waits for a start that is still under way."""
        await asyncio.wait([self._started], timeout=INIT_TIMEOUT_S)
        if self._started.done():
            self._started.exception()  # whoever launched has heard of it; nobody has when nothing was launched
        try:
            if self._ray is not None:
                await self._call(SHUTDOWN_TIMEOUT_S, self._ray.shutdown)
        except TimeoutError:
            log.error("Ray did not shut down within %g s; `ray stop` ends what is left", SHUTDOWN_TIMEOUT_S)
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)
            if self._session is not None:
                shutil.rmtree(self._session, ignore_errors=True)

    async def _start(self) -> None:
        try:
            await self._call(INIT_TIMEOUT_S, self._init)
        except TimeoutError:
            raise ConfigError(f"Ray did not start within {INIT_TIMEOUT_S:g} s; is the machine short of memory?") from None
        self._on_started()

    async def _call(self, timeout_s: float, function: Callable[[], T]) -> T:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(timeout_s):
            return await loop.run_in_executor(self._thread, function)

    # ---- on the Ray thread ---------------------------------------------------------------------------------------

    def _init(self) -> None:
        local = not self._config.ray_address
        if not local:
            probe(self._config.ray_address)
        prepare_ray(secrets.token_hex(32) if local else "")
        import ray

        logging.getLogger("ray").setLevel(logging.ERROR)
        common: dict[str, Any] = {"log_to_driver": True, "logging_level": logging.ERROR, "configure_logging": False}
        try:
            if local:
                self._session = new_session()
                with own_process_groups():
                    ray.init(
                        address="local",
                        # Ray keeps one warm process per CPU: as many as there are actors to start, no more.
                        num_cpus=self._actors,
                        num_gpus=0,
                        include_dashboard=False,
                        object_store_memory=int(self._config.object_store_bytes),
                        _temp_dir=str(self._session),
                        **common,
                    )
            else:
                ray.init(address=self._config.ray_address, namespace="tandem", **common)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            if local:
                raise ConfigError(f"cannot start a local Ray: {error}") from error
            raise ConfigError(
                f"cannot join the Ray cluster at {self._config.ray_address}: {error} "
                "(where it asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN)"
            ) from error
        self._ray = ray
        self._placement = self._ray.cluster_resources()
        if not local:
            self._check_reachable()

    def _check_reachable(self) -> None:
        """Workers on other nodes must be able to report back."""
        alive = [node for node in self._ray.nodes() if node["Alive"]]
        if len(alive) > 1 and self._config.admin.startswith(("127.", "localhost", "[::1]")):
            raise ConfigError(
                f"cluster.admin is {self._config.admin}, which the {len(alive)} nodes of this Ray cluster cannot reach; "
                "give an address of this machine (--admin HOST:PORT)"
            )

    def _create(self, spec: HostSpec) -> tuple[Any, Future[None]]:
        """An actor, and the future that is done once Ray has placed and started it."""
        role = resource_of(spec.role)
        actor = (
            self._ray.remote(_Placed)
            .options(
                num_cpus=ACTOR_CPUS,
                resources={role: 0.001} if role in self._placement else None,
                scheduling_strategy="SPREAD" if spec.role is WorkerRole.STORE else "DEFAULT",  # one per host
                max_restarts=0,
                max_task_retries=0,
                max_concurrency=4,  # run() blocks one thread; placed() and stop() need others
            )
            .remote(spec, bool(self._config.ray_address))
        )
        return actor, actor.placed.remote().future()

    def _request(self, workers: Mapping[WorkerRole, int]) -> None:
        from ray.autoscaler.sdk import request_resources

        request_resources(bundles=bundles_of(workers, self._placement))

    def kill(self, actor: Any) -> None:
        self._ray.kill(actor, no_restart=True)


class _Actor:
    """A running actor. Its end is noticed through its pending `run()` call, milliseconds after the process dies."""

    def __init__(self, launcher: RayLauncher, actor: Any, done: asyncio.Future[Ended]) -> None:
        self.exited: asyncio.Future[Ended] = asyncio.get_running_loop().create_future()
        self._launcher = launcher
        self._actor = actor
        self._done = done
        self._task = asyncio.create_task(self._watch(), name=f"ray actor {actor}")

    async def stop(self, grace_s: float) -> None:
        if not self.exited.done() and grace_s > 0:
            await self._launcher._call(CALL_TIMEOUT_S, lambda: self._actor.stop.remote(grace_s))
            await asyncio.wait([self.exited], timeout=grace_s)
        if not self.exited.done():
            await self._kill()
            await asyncio.wait([self.exited], timeout=CALL_TIMEOUT_S)

    async def _watch(self) -> None:
        try:
            ended = Ended(*await self._done)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # Ray's own tree: whatever it is, the actor is of no more use
            ended = Ended(_first_line(error))
        await self._kill()  # run() is over, the process is not
        if not self.exited.done():
            self.exited.set_result(ended)

    async def _kill(self) -> None:
        try:
            await self._launcher._call(CALL_TIMEOUT_S, lambda: self._launcher.kill(self._actor))
        except Exception as error:
            log.warning("Ray could not kill an actor: %s", _first_line(error))


class _Placed(Host):
    """A host that knows where Ray put it."""

    def __init__(self, spec: HostSpec, joined: bool) -> None:
        os.dup2(2, 1)  # what libraries print belongs to the log, not to the standard output of `tandem up`
        if joined:
            import ray.util

            address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
            spec = replace(spec, node=address, listen=f"{address}:0")
        super().__init__(spec)

    def placed(self) -> None:
        """Answers once the actor exists."""


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no reason given'}"
