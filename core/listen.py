"""A listening TCP socket, made by us where a library would not say enough or share too much."""

from __future__ import annotations

import socket

from core.errors import ConfigError

BACKLOG = 1024


def bind(address: str, what: str, *, shared: bool = False) -> tuple[socket.socket, str]:
    """The socket and its address, port 0 resolved. Raises ConfigError, naming `what` wanted to listen.

    `shared`: other processes of ours may listen there too, and each gets its part of the connections.
    """
    host, _, port = address.rpartition(":")
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((host.strip("[]"), int(port)))
        sock.listen(BACKLOG)
        sock.setblocking(False)
        return sock, f"{host}:{sock.getsockname()[1]}"
    except (OSError, ValueError, OverflowError) as error:
        sock.close()
        raise ConfigError(f"cannot listen for {what} on {address}: {error}; choose another router.{what.lower()}") from None
