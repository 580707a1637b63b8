"""One connection between two ends that know each other: buffers straight into the kernel and straight out of it.

Sockets block, in threads of their own: that moves two to three times what an event loop does with small reads. Whoever
waits for such a thread ends it with `Wire.abort`, from any other thread.
"""

from __future__ import annotations

import os
import select
import socket
import ssl
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from core.config import TcpConfig
from core.errors import ConfigError
from kvtransfer import tcp_frames as frames
from kvtransfer.tcp_frames import Buffer, FrameError, Status

HANDSHAKE_S = 5.0
IOV_MAX = 1024
WAKE_BYTES = 2**20  # being woken for every 64 KiB costs as much as copying them
WAKE_BYTES_MIN = 128 * 1024  # the last bytes are read as they come
LOCAL_QUEUE_BYTES = 512 * 1024
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 15), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))


@dataclass(frozen=True, slots=True)
class Security:
    """What both ends need to trust each other. Without TLS nothing is hidden, only proven."""

    secret: bytes = b""
    server: ssl.SSLContext | None = None
    client: ssl.SSLContext | None = None


def load_security(config: TcpConfig) -> Security:
    """Reads the files that the configuration names. Raises ConfigError saying which one cannot be used."""
    secret = _read_secret(config.secret_file) if config.secret_file else b""
    if not (config.cert or config.key or config.ca):
        return Security(secret)
    if not (config.cert and config.key and config.ca):
        raise ConfigError("transfer.tcp: cert, key and ca belong together; set all three for TLS, or none")
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False  # workers come and go on any address: whoever that authority signed is one of us
    for context in (server, client):
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_cert_chain(config.cert, config.key)
            context.load_verify_locations(config.ca)
        except OSError as error:
            raise ConfigError(f"transfer.tcp: {config.cert}, {config.key} or {config.ca} cannot be used: {error}") from None
    server.num_tickets = 0  # nothing unasked-for: bytes at an idle connection mean that it is of no use any more
    return Security(secret, server, client)


def _read_secret(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            secret = file.read().strip()
    except OSError as error:
        raise ConfigError(f"transfer.tcp.secret_file: cannot read {path}: {error.strerror}") from None
    if len(secret) < 16:
        raise ConfigError(f"transfer.tcp.secret_file: {path} holds {len(secret)} bytes; put at least 16 random ones there")
    return secret


class Wire:
    """A connected socket. One thread sends and receives at a time; `abort` may come from any."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()
        self._wakes_at = 1
        self._scratch = memoryview(bytearray(frames.REQUEST_BODY_BYTES_MAX))

    def start_tls(self, context: ssl.SSLContext, *, server_side: bool) -> None:
        secured = context.wrap_socket(self._sock, server_side=server_side, do_handshake_on_connect=False)
        with self._lock:
            self._sock = secured  # the plain one is detached by now
        secured.do_handshake()

    def set_deadlines(self, receive_s: float, send_s: float) -> None:
        """From now on one call that makes no headway for so long fails with OSError."""
        self._sock.settimeout(None)
        for option, seconds in ((socket.SO_RCVTIMEO, receive_s), (socket.SO_SNDTIMEO, send_s)):
            self._sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(seconds), int(seconds % 1 * 1e6) or 1))

    def send(self, buffers: Sequence[Buffer]) -> None:
        if isinstance(self._sock, ssl.SSLSocket):
            for buffer in buffers:
                self._sock.sendall(buffer)
            return
        for start in range(0, len(buffers), IOV_MAX):
            left: Sequence[Buffer] = buffers[start : start + IOV_MAX]
            while left:
                left = after(left, self._sock.sendmsg(left))

    def receive(self, views: Sequence[memoryview], behind: int = 0) -> None:
        """Fills the views; `behind`: bytes sure to come after them. Raises ConnectionError when the stream ends before.

        The kernel wakes us when there is so much to read that it pays, and must never wait for bytes that nobody sends:
        we read up to where as many are still to come.
        """
        if isinstance(self._sock, ssl.SSLSocket):
            for view in views:
                self._fill(view)
            return
        left: Sequence[Buffer] = views
        coming = sum(map(len, views)) + behind
        while left:
            wake = min(WAKE_BYTES, coming // 2) if coming >= 2 * WAKE_BYTES_MIN else 0
            self._wake_at(max(1, wake))
            received = self._sock.recvmsg_into(_upto(left[:IOV_MAX], coming - wake), 0, socket.MSG_WAITALL)[0]
            left = after(left, _some(received))
            coming -= received

    def read(self, size: int) -> memoryview:
        """The next `size` bytes, valid until the next call."""
        self._wake_at(1)
        view = self._scratch[:size]
        self._fill(view)
        return view

    def quiet(self) -> bool:
        """Whether an idle connection still is one: nothing has come, no end either."""
        poller = select.poll()
        poller.register(self._sock, select.POLLIN)
        return not poller.poll(0)

    def abort(self) -> None:
        """Wakes the thread that is in a call here; it fails."""
        with self._lock:
            try:
                socket.socket.shutdown(self._sock, socket.SHUT_RDWR)  # not SSLSocket's, which pulls the rug from under a reader
            except OSError:
                return  # closed or never connected

    def close(self) -> None:
        with self._lock:
            self._sock.close()

    def _wake_at(self, size: int) -> None:
        if size != self._wakes_at:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size)
            self._wakes_at = size

    def _fill(self, view: memoryview) -> None:
        flags = 0 if isinstance(self._sock, ssl.SSLSocket) else socket.MSG_WAITALL
        while view:
            view = view[_some(self._sock.recv_into(view, len(view), flags)) :]


def _upto(buffers: Sequence[Buffer], size: int) -> Sequence[Buffer]:
    """The first `size` bytes of `buffers`, all of them when they hold fewer."""
    for place, buffer in enumerate(buffers):
        if size <= len(buffer):
            return [*buffers[:place], memoryview(buffer)[:size]]
        size -= len(buffer)
    return buffers


def after(buffers: Sequence[Buffer], done: int) -> Sequence[Buffer]:
    """What is left of `buffers` once their first `done` bytes have gone."""
    for place, buffer in enumerate(buffers):
        if done < len(buffer):
            return [memoryview(buffer)[done:], *buffers[place + 1 :]]
        done -= len(buffer)
    return ()


def tune(sock: socket.socket) -> None:
    """No waiting for small frames, and a peer whose machine is gone is noticed within half a minute."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000)


def tune_local(sock: socket.socket) -> None:
    """Of a sender whose peer is on this machine: bytes are to be read while they are in the cache, so few of them queue, and
    there is no network to pace them for, as BBR would."""
    try:
        if sock.getpeername()[0] != sock.getsockname()[0]:
            return
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LOCAL_QUEUE_BYTES)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
    except OSError:  # the peer has hung up, or the system keeps its own choice: it works all the same
        return


def greet(wire: Wire, epoch: int, security: Security) -> None:
    """The server's half of the handshake. Raises FrameError, OSError."""
    if security.server is not None:
        wire.start_tls(security.server, server_side=True)
    server_nonce = os.urandom(frames.NONCE_BYTES)
    wire.send([frames.greeting(server_nonce)])
    try:
        believed, nonce = frames.parse_hello(wire.read(frames.HELLO_BYTES), security.secret, server_nonce)
    except FrameError:
        wire.send([frames.welcome(Status.DENIED, 0, b"", b"", b"")])
        raise
    status = Status.OK if believed == epoch else Status.STALE_EPOCH
    wire.send([frames.welcome(status, epoch, security.secret, server_nonce, nonce)])
    if status is not Status.OK:
        raise FrameError(f"a client that looks for epoch {believed}")


def introduce(wire: Wire, epoch: int, security: Security) -> None:
    """The client's half. Raises StaleEpochError, FrameError, OSError."""
    if security.client is not None:
        wire.start_tls(security.client, server_side=False)
    server_nonce = frames.parse_greeting(wire.read(frames.GREETING_BYTES))
    nonce = os.urandom(frames.NONCE_BYTES)
    wire.send([frames.hello(epoch, security.secret, server_nonce, nonce)])
    frames.check_welcome(wire.read(frames.WELCOME_BYTES), epoch, security.secret, server_nonce, nonce)


def _some(received: int) -> int:
    if not received:
        raise ConnectionError("the connection ended")
    return received
