"""Whole servers for whole measurements: ours through `tandem up`, vLLM through its own command."""

from __future__ import annotations

import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.peers import python_of

READY_TIMEOUT_S = 180.0
VLLM_TIMEOUT_S = 200.0
STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Tandem:
    grpc: str
    http: str
    pid: int
    ready_s: float
    admin: str = ""


@contextmanager
def tandem(*flags: str, config: str = "") -> Iterator[Tandem]:
    """`tandem up FLAGS` until the block ends. `config` is YAML. Raises RuntimeError with the end of the log otherwise."""
    with TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        (Path(folder) / "tandem.yaml").write_text(config)
        command = [str(Path(sys.executable).with_name("tandem")), "up", "--config", f"{folder}/tandem.yaml", *flags]
        started = time.perf_counter()
        with log.open("wb") as errors, _process(command, stdout=subprocess.PIPE, stderr=errors) as process:
            line = _first_line(process)
            if not (found := re.match(r"tandem ready grpc=(\S+) http=(\S+)(?: admin=(\S+))?", line)):
                raise RuntimeError(f"tandem up did not become ready: {line!r}\n{log.read_text()[-3000:]}")
            yield Tandem(found[1], found[2], process.pid, time.perf_counter() - started, found[3] or "")


@dataclass(frozen=True, slots=True)
class Vllm:
    """A vLLM server that was started; it answers once `wait` returned."""

    url: str
    _process: subprocess.Popen[bytes]
    _log: Path

    def wait(self) -> None:
        """Until it answers. Raises RuntimeError with what it said last when it ends or takes longer than VLLM_TIMEOUT_S."""
        if not _answers(f"{self.url}/health", self._process):
            code = self._process.poll()
            what = f"did not answer within {VLLM_TIMEOUT_S:g} s" if code is None else f"ended with status {code}"
            raise RuntimeError(f"vllm {what}; {self.last_words()}")

    def stand_still(self, still: bool) -> None:
        """Halts all its processes between its turns, or lets them go on: threads of NIXL spin whether or not there is work."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGSTOP if still else signal.SIGCONT)

    def last_words(self) -> str:
        """Of its log: the last line that names an error, or the last line."""
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        named = [line for line in lines if re.search(r"\bERROR\b|Error:", line)]
        return f"its log ends: {(named or lines or ['(empty)'])[-1][-300:]}"


@contextmanager
def vllm(model: Path, dtype: str, *flags: str, cores: str = "auto", env: dict[str, str] | None = None) -> Iterator[Vllm]:
    """Starts one vLLM CPU server and does not wait for it: importing it takes half a minute of a core, so several start at
    once. `cores` binds its threads. Eager: compiling takes half a minute more and makes it a tenth faster.
    Raises RuntimeError when it is not installed.
    """
    python = python_of("vllm")
    if python is None:
        raise RuntimeError("the peer vllm is not installed: make peers")
    port = free_port()
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_CPU_OMP_THREADS_BIND": cores,
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        **(env or {}),
    }
    command = [str(python.with_name("vllm")), "serve", str(model), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", dtype, "--max-model-len", "2048", "--served-model-name", "m", "--enforce-eager", *flags]
    with TemporaryDirectory() as folder, (Path(folder) / "log").open("wb") as log:
        quiet = {"stdout": log, "stderr": subprocess.STDOUT}
        with _process(command, env={**os.environ, **settings}, cwd=folder, **quiet) as process:
            server = Vllm(f"http://127.0.0.1:{port}", process, Path(folder) / "log")
            try:
                yield server
            finally:
                server.stand_still(False)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _process(command: list[str], **options: object) -> Iterator[subprocess.Popen[bytes]]:
    """A child in a session of its own, asked to stop at the end; whoever of its family outlives it is killed."""
    process = subprocess.Popen(command, start_new_session=True, **options)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _first_line(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if not selector.select(READY_TIMEOUT_S):
            return ""
    return process.stdout.readline().decode()


def _answers(url: str, process: subprocess.Popen[bytes]) -> bool:
    deadline = time.monotonic() + VLLM_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=1):
                return True
        except (urllib.error.URLError, OSError):
            try:  # the process ending is what we wait for between two questions
                process.wait(0.3)
            except subprocess.TimeoutExpired:
                continue
    return False
