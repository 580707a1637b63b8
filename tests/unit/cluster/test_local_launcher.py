"""The local launcher with real child processes, which hold no model."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cluster.host import Ended
from cluster.launcher import LocalLauncher, process_gone
from core.config import Config, load
from core.hostspec import HostSpec
from core.request import WorkerRole

HOST = Path(__file__).with_name("trivial_host.py")
DEADLINE_S = 20.0


def spec_of(name: str = "", grace_s: float = 5.0) -> HostSpec:
    config = load(overrides={"model.name": name, "cluster.grace_s": grace_s})
    return HostSpec("decode-0", WorkerRole.DECODE, 1, config, controller="")


@pytest.fixture
async def lines() -> asyncio.Queue[str]:
    return asyncio.Queue()


@pytest.fixture
async def launcher(lines: asyncio.Queue[str]) -> AsyncIterator[LocalLauncher]:
    launcher = LocalLauncher((sys.executable, str(HOST)), on_line=lines.put_nowait)
    yield launcher
    await launcher.close()


async def line_with(lines: asyncio.Queue[str], part: str) -> str:
    async with asyncio.timeout(DEADLINE_S):
        while part not in (line := await lines.get()):
            pass
        return line


async def ended(handle: object) -> Ended:
    async with asyncio.timeout(DEADLINE_S):
        return await asyncio.shield(handle.exited)  # type: ignore[attr-defined, no-any-return]


async def pid_of(handle: object, lines: asyncio.Queue[str]) -> int:
    """Waits until the host runs."""
    await line_with(lines, "decode-0 runs")
    return handle._process.pid  # type: ignore[attr-defined, no-any-return]


def files(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


async def test_a_host_stops_in_order_when_asked(launcher: LocalLauncher, lines: asyncio.Queue[str]) -> None:
    handle = await launcher.launch(spec_of())
    await line_with(lines, "decode-0 runs")
    await handle.stop(5.0)
    assert await ended(handle) == Ended("stopped")


async def test_what_a_library_prints_goes_to_the_log_with_the_name(launcher: LocalLauncher, lines: asyncio.Queue[str]) -> None:
    await launcher.launch(spec_of())
    assert await line_with(lines, "library prints") == "decode-0: a library prints this"


async def test_a_killed_host_is_noticed(launcher: LocalLauncher, lines: asyncio.Queue[str]) -> None:
    handle = await launcher.launch(spec_of())
    os.kill(await pid_of(handle, lines), signal.SIGKILL)
    assert await ended(handle) == Ended("killed by SIGKILL")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fail", Ended("there is no model at /nowhere; give another path", permanent=True)),
        ("crash", Ended("ZeroDivisionError: a bug", permanent=False)),
    ],
)
async def test_a_host_says_why_it_ended(launcher: LocalLauncher, name: str, expected: Ended) -> None:
    assert await ended(await launcher.launch(spec_of(name))) == expected


async def test_a_host_that_ignores_the_request_is_cancelled_by_itself(
    launcher: LocalLauncher, lines: asyncio.Queue[str]
) -> None:
    handle = await launcher.launch(spec_of("hang", grace_s=0.1))
    await line_with(lines, "decode-0 runs")
    await handle.stop(10.0)
    assert await ended(handle) == Ended("did not finish within its grace time")


async def test_a_host_that_cannot_even_be_cancelled_is_killed(launcher: LocalLauncher, lines: asyncio.Queue[str]) -> None:
    handle = await launcher.launch(spec_of("hang"))
    os.kill(await pid_of(handle, lines), signal.SIGSTOP)
    await handle.stop(0.2)
    assert await ended(handle) == Ended("killed by SIGKILL")


async def test_a_command_that_dies_at_once_is_explained_by_its_status(lines: asyncio.Queue[str]) -> None:
    launcher = LocalLauncher((sys.executable, "-c", "import sys; sys.exit('no such thing')"), on_line=lines.put_nowait)
    handle = await launcher.launch(spec_of())
    assert await ended(handle) == Ended("exited with status 1")
    assert await line_with(lines, "no such thing") == "decode-0: no such thing"


async def test_children_of_a_killed_launcher_end_in_order(tmp_path: Path) -> None:
    """kill -9 of the parent leaves neither a child nor what the child holds."""
    spec = spec_of(f"shm:{tmp_path}/kv")
    code = (
        "import asyncio, sys\n"
        "from cluster.launcher import LocalLauncher\n"
        "from core.hostspec import HostSpec\n"
        "async def main():\n"
        "    launcher = LocalLauncher((sys.executable, sys.argv[1]), on_line=lambda line: print(line, flush=True))\n"
        "    handle = await launcher.launch(HostSpec.from_json(sys.argv[2]))\n"
        "    print(handle._process.pid, flush=True)\n"
        "    await handle.exited\n"
        "asyncio.run(main())\n"
    )
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, str(HOST), spec.to_json(), stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    async with asyncio.timeout(DEADLINE_S):
        pid = int(await parent.stdout.readline())
        while b"decode-0 runs" not in await parent.stdout.readline():
            pass
        assert files(tmp_path)
        parent.kill()
        await parent.wait()
        await process_gone(pid)
    assert files(tmp_path) == []


def test_a_spec_survives_the_pipe() -> None:
    spec = HostSpec("prefill-3", WorkerRole.PREFILL, 7, Config(), "127.0.0.1:5", "node-a", "10.0.0.1:0")
    assert HostSpec.from_json(spec.to_json()) == spec
    assert "\n" not in spec.to_json()
