"""A real cluster of real processes for a test: `tandem up`, its pids, and waiting for what should become true."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TANDEM = str(Path(sys.executable).with_name("tandem"))
READY_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 30.0


@dataclass(slots=True)
class Cluster:
    process: subprocess.Popen[str]
    grpc: str
    http: str
    admin: str
    log: Path

    def status(self) -> dict[str, Any]:
        done = subprocess.run([TANDEM, "status", "--json", "--grpc", self.grpc], capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def workers(self, role: str, state: str = "ready") -> list[dict[str, Any]]:
        return [w for w in self.status()["workers"] if w["role"] == role and w["state"] == state]

    def only(self, role: str) -> dict[str, Any]:
        """The one ready worker of a role, as soon as there is one."""
        (worker,) = eventually(lambda: self.workers(role), timeout_s=40)
        return worker


def eventually(check: Callable[[], Any], timeout_s: float = 20.0, every_s: float = 0.1) -> Any:
    """The first truthy value of `check`, or the last reason it gave for not being true."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            value, reason = check(), None
        except AssertionError as error:
            value, reason = None, error
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not true within {timeout_s} s: {reason or value!r}")
        select.select([], [], [], every_s)


@contextmanager
def tandem_up(folder: Path, *flags: str, config: str = "") -> Iterator[Cluster]:
    """`tandem up` with local processes on free ports; at the end SIGTERM, and nothing may remain."""
    folder.mkdir(parents=True, exist_ok=True)
    log, file = folder / "log", folder / "tandem.yaml"
    file.write_text(config)
    command = [TANDEM, "--traceback", "up", "--config", str(file), "--launcher", "local", *flags]
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True)
    try:
        assert process.stdout is not None
        readable, _, _ = select.select([process.stdout], [], [], READY_TIMEOUT_S)
        line = process.stdout.readline() if readable else ""
        found = re.fullmatch(r"tandem ready grpc=(\S+) http=(\S+) admin=(\S+)\n", line)
        assert found, f"no ready line but {line!r}:\n{log.read_text()[-4000:]}"
        yield Cluster(process, found[1], found[2], found[3], log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_TIMEOUT_S) == 0, log.read_text()[-4000:]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
