"""Around a local Ray's start: its directory, its process groups, and whether a remote one answers. Imports no Ray."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from core.config import state_dir
from core.errors import ConfigError

PROBE_TIMEOUT_S = 5.0
SESSION_BASE_MAX = 40  # characters: the paths of Ray's sockets must stay under 107
_SESSION_PREFIX = "ray-"


def probe(address: str) -> None:
    """Raises ConfigError when nobody listens at `address`: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return  # "auto", or what only Ray understands
    try:
        socket.create_connection((host, int(port)), PROBE_TIMEOUT_S).close()
    except OSError as error:
        raise ConfigError(f"no Ray cluster answers at cluster.ray_address {address}: {error}") from None


def new_session() -> Path:
    """A directory for a local Ray's files, out of reach of other users; those of launchers that were killed are removed."""
    base = state_dir()
    if len(str(base)) > SESSION_BASE_MAX:
        base = Path("/tmp")
    for path in base.glob(f"{_SESSION_PREFIX}*"):
        pid = path.name.removeprefix(_SESSION_PREFIX).partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and path.stat().st_uid == os.getuid():
            shutil.rmtree(path, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{_SESSION_PREFIX}{os.getpid()}-", dir=base))


class _Leaving:
    """Whether children forked now shall leave our process group; the hook cannot be taken back, so it asks."""

    def __init__(self) -> None:
        self.wanted = False
        os.register_at_fork(after_in_child=lambda: os.setpgid(0, 0) if self.wanted else None)


_leaving: _Leaving | None = None


@contextlib.contextmanager
def own_process_groups() -> Iterator[None]:
    """Processes that Ray starts meanwhile get process groups of their own: a signal to ours (a terminal's Ctrl-C, a
    supervisor's SIGTERM) must reach us alone, or Ray is gone before its actors could end in order. Ray forks with a
    `preexec_fn`, for which Python runs the hooks of `register_at_fork`."""
    global _leaving
    _leaving = _leaving or _Leaving()
    _leaving.wanted = True
    try:
        yield
    finally:
        _leaving.wanted = False
