"""`tandem up`: builds the cluster, keeps it until told to end, takes it down."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from cluster.controller import Controller, desired_of
from cluster.departures import Departures
from cluster.directory_service import directory_registration
from cluster.launcher import Launcher, LocalLauncher, check_address, to_stderr
from cluster.report import ClusterSnapshot
from cluster.service import ClusterServicer, cluster_registration
from core.clock import SystemClock
from core.config import Config
from core.errors import ConfigError
from core.request import WorkerRole
from core.service import serve
from engine.spec import parse_spec
from kvtransfer.directory import open_directory
from kvtransfer.local_directory import ClockedDirectory, LocalDirectory
from kvtransfer.shared_arena import remove_stale

log = logging.getLogger(__name__)

REDIS_CHECK_S = 2.0
FAILED_GRACE_S = 3.0
"""For hosts of a cluster that could not come up: nothing runs on them, but their shared memory has to be removed."""


@dataclass(frozen=True, slots=True)
class Addresses:
    grpc: str
    http: str
    admin: str


def up(
    config: Config,
    on_ready: Callable[[Addresses], None],
    on_change: Callable[[ClusterSnapshot], None] = lambda snapshot: None,
    on_line: Callable[[str], None] = to_stderr,
) -> None:
    """Blocks while the cluster runs: until SIGTERM, Ctrl-C or a Shutdown call. Call from the main thread.

    `on_ready` is called once, when requests can be served; `on_change` with every snapshot until then, `on_line`
    with what local hosts write to standard error. Raises ConfigError when the cluster cannot come up. A second signal
    ends everything at once, without the grace time.
    """
    desired = desired_of(config)
    check_model(config.model.path)
    for name, address in (
        ("cluster.admin", config.cluster.admin),
        ("router.grpc", config.router.grpc),
        ("router.http", config.router.http),
    ):
        check_address(name, address)
    with asyncio.Runner() as runner:
        runner.run(_up(config, desired, on_ready, on_change, on_line))


def check_model(path: str) -> None:
    """What can be said of a model without loading it. Raises ConfigError; a Hub id passes, workers look it up."""
    directory = Path(path).expanduser()
    looks_local = directory.is_absolute() or path.startswith((".", "~")) or path.count("/") != 1
    if not directory.exists():
        if looks_local:
            raise ConfigError(f"there is no model at {path}; give a Hugging Face directory or a Hub id (--model)")
        return
    for name, what in (("config.json", "its configuration"), ("tokenizer.json", "its tokenizer")):
        if not (directory / name).is_file():
            raise ConfigError(f"{path} is not a Hugging Face model directory: {name} ({what}) is missing")
    if not any(directory.glob("*.safetensors")):
        raise ConfigError(f"{path} holds no *.safetensors weights; other formats are not loaded")
    where = directory / "config.json"
    try:
        config = json.loads(where.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where} cannot be read as JSON: {error}; download it again") from None
    parse_spec(config, str(where))


async def _up(
    config: Config,
    desired: dict[WorkerRole, int],
    on_ready: Callable[[Addresses], None],
    on_change: Callable[[ClusterSnapshot], None],
    on_line: Callable[[str], None],
) -> None:
    signals = _Signals()
    await _check_directory(config)
    with contextlib.ExitStack() as ports:
        if config.cluster.routers > 1 and config.router.share_address:
            config = with_ports(config, ports)
        await _run(config, desired, signals, on_ready, on_change, on_line)


def with_ports(config: Config, held: contextlib.ExitStack) -> Config:
    """Free ports of the routers chosen now, where it is left to us: they all listen at the same. `held` keeps them ours: a
    socket that is bound and does not listen takes no connection."""
    update = {}
    for name in ("grpc", "http"):
        address = getattr(config.router, name)
        host, _, port = address.rpartition(":")
        if int(port) == 0:
            sock = held.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind((host.strip("[]"), 0))
            update[name] = f"{host}:{sock.getsockname()[1]}"
    return config.model_copy(update={"router": config.router.model_copy(update=update)})


async def _run(
    config: Config,
    desired: dict[WorkerRole, int],
    signals: _Signals,
    on_ready: Callable[[Addresses], None],
    on_change: Callable[[ClusterSnapshot], None],
    on_line: Callable[[str], None],
) -> None:
    async with _launcher(config, on_line, signals) as launcher:
        controller = Controller(config, launcher, desired)
        servicer = ClusterServicer(controller, config.cluster.heartbeat_s, signals.stop.set)
        table, clock = LocalDirectory(), SystemClock()
        mine = directory_registration(table, clock)
        shared = open_directory(config.store, config.redis, "") if config.redis else ClockedDirectory(table, clock)
        departures = Departures(shared)
        controller.gone = departures.gone
        async with (
            serve(config.cluster.admin, cluster_registration(servicer), mine) as server,
            contextlib.aclosing(departures),
        ):
            controller.address = server.address
            control = asyncio.create_task(controller.run(), name="control loop")
            front = asyncio.create_task(_announce(controller, on_ready, on_change), name="announce")
            ending = asyncio.create_task(signals.stop.wait(), name="wait for the end")
            try:
                await asyncio.wait({control, ending}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                await _cancel(front, ending)
                grace_s = config.cluster.grace_s
                await _take_down(controller, control, min(FAILED_GRACE_S, grace_s) if control.done() else grace_s, signals)
                remove_stale(config.transfer.shm_dir)  # of workers that were killed and not replaced any more


async def _check_directory(config: Config) -> None:
    """Raises ConfigError for a Redis that will never do; one that is away is only mentioned, as requests do without it."""
    if not config.redis:
        return
    from kvtransfer.redis_check import check_redis

    trouble = await check_redis(config.redis, max(REDIS_CHECK_S, config.store.directory_timeout_s))
    if trouble:
        log.warning("redis: %s; until it does, workers find only their own blocks", trouble)


async def _take_down(controller: Controller, control: asyncio.Task[None], grace_s: float, signals: _Signals) -> None:
    """Ends the workers, orderly or, at the second signal, at once; surfaces the error of a control loop that failed."""
    failed = control.done()
    await _cancel(control)
    orderly = asyncio.create_task(controller.stop_all(grace_s), name="orderly end")
    hurry = asyncio.create_task(signals.hurry.wait(), name="wait for a second signal")
    await asyncio.wait({orderly, hurry}, return_when=asyncio.FIRST_COMPLETED)
    if not orderly.done():
        log.warning("asked twice: ending at once")
        await _cancel(orderly)
        await controller.stop_all(0.0)
    await _cancel(hurry)
    if failed:
        control.result()


async def _announce(
    controller: Controller, on_ready: Callable[[Addresses], None], on_change: Callable[[ClusterSnapshot], None]
) -> None:
    version = -1
    while not controller.ready.is_set():
        snapshot = await controller.changed(version, timeout_s=0.5)
        version = snapshot.version
        on_change(snapshot)
    router = next(m.report for m in controller.snapshot().members if m.report.role is WorkerRole.ROUTER)
    on_ready(Addresses(router.grpc_address, router.http_address, controller.address))


@contextlib.asynccontextmanager
async def _launcher(config: Config, on_line: Callable[[str], None], signals: _Signals) -> AsyncIterator[Launcher]:
    launcher: Launcher
    if config.cluster.launcher == "ray":
        from cluster.ray_launcher import RayLauncher

        launcher = RayLauncher(config.cluster, on_started=signals.install, stores=config.store.nodes)
    else:
        launcher = LocalLauncher(on_line=on_line)
    try:
        yield launcher
    finally:
        await launcher.close()


class _Signals:
    """SIGTERM, SIGINT and SIGHUP: the first asks for an orderly end, the second for an immediate one."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.hurry = asyncio.Event()
        self.install()

    def install(self) -> None:
        """Again where somebody may have replaced them."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        (self.hurry if self.stop.is_set() else self.stop).set()


async def _cancel(*tasks: asyncio.Task[object] | asyncio.Task[None] | asyncio.Task[bool]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
