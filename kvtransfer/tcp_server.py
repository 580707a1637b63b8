"""The source's side of tcp: a listening socket, and a thread per connection that sends blocks straight from the arena."""

from __future__ import annotations

import logging
import socket
import threading
import time

import numpy as np

from core.errors import ConfigError, DigestMismatchError, LayoutMismatchError, TransferError
from kvtransfer import tcp_frames as frames
from kvtransfer.codecs import Codec
from kvtransfer.encoded import check_before, encode_blocks
from kvtransfer.exports import Exports
from kvtransfer.spans import coalesce
from kvtransfer.tcp_frames import Buffer, Request
from kvtransfer.tcp_wire import HANDSHAKE_S, Security, Wire, greet, tune, tune_local
from kvtransfer.transport import BlocksGoneError

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 512
IDLE_S = 600.0  # a connection nobody asked anything on for so long is closed; its other end dials again
STALL_S = 20.0  # a peer that takes nothing for so long is gone
REPLY_S_MAX = 300.0
SPAN_BYTES = 8 * 2**20  # handed to the kernel at a time; the deadline is looked at in between
_CLOSE_S = 5.0


class TcpServer:
    """Serves the blocks of live exports to whoever passes the handshake. Listens once it is built.

    `bind` is HOST:PORT, port 0 picks one; `advertise` the host that others reach us by when `bind` names every interface.
    Raises ConfigError when it cannot listen there.
    """

    def __init__(
        self,
        exports: Exports,
        bind: str,
        *,
        security: Security | None = None,
        advertise: str = "",
    ) -> None:
        self._exports = exports
        self._security = security or Security()
        self._flat = exports.arena.bytes_view().reshape(-1).data
        self._connections: dict[Wire, threading.Thread] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        host, self._listener = _listen(bind)
        shown = advertise if advertise and host in ("0.0.0.0", "::", "") else host
        self.address = f"[{shown}]:{self.port}" if ":" in shown else f"{shown}:{self.port}"
        self._accepting = threading.Thread(target=self._accept, name="kv-tcp-accept", daemon=True)
        self._accepting.start()

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def close(self) -> None:
        """Ends every connection, in mid-reply too, and waits for their threads: none reads the arena afterwards. Idempotent."""
        if self._closing.is_set():
            return
        self._closing.set()
        _shutdown(self._listener)
        self._accepting.join(_CLOSE_S)
        self._listener.close()
        with self._lock:
            running = dict(self._connections)
        for wire in running:
            wire.abort()
        deadline = time.monotonic() + _CLOSE_S
        for thread in running.values():
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                log.error("%s did not end", thread.name)

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                sock, peer = self._listener.accept()
            except OSError as error:
                if not self._closing.wait(0.1):  # out of descriptors, or the peer has hung up already
                    log.warning("cannot accept a connection: %s", error.strerror)
                continue
            self._begin(sock, f"{peer[0]}:{peer[1]}")

    def _begin(self, sock: socket.socket, peer: str) -> None:
        wire = Wire(sock)
        thread = threading.Thread(target=self._serve, args=(wire, sock, peer), name=f"kv-tcp {peer}", daemon=True)
        with self._lock:
            if len(self._connections) >= CONNECTIONS_MAX or self._closing.is_set():
                log.warning("%s refused: %d connections are open", peer, len(self._connections))
                wire.close()
                return
            self._connections[wire] = thread
        thread.start()

    def _serve(self, wire: Wire, sock: socket.socket, peer: str) -> None:
        try:
            tune(sock)
            tune_local(sock)
            sock.settimeout(HANDSHAKE_S)
            greet(wire, self._exports.epoch, self._security)
            wire.set_deadlines(IDLE_S, STALL_S)
            while not self._closing.is_set():
                self._answer(wire)
        except ConnectionError as error:
            log.debug("%s hung up: %s", peer, error)
        except (OSError, TransferError) as error:
            if not self._closing.is_set():
                log.warning("the connection of %s is closed: %s", peer, error)
        except Exception:  # our own mistake must not go unseen in a thread
            log.exception("serving %s failed", peer)
        finally:
            with self._lock:
                self._connections.pop(wire, None)
            wire.close()

    def _answer(self, wire: Wire) -> None:
        head = frames.parse_request_head(wire.read(frames.REQUEST_HEAD_BYTES))
        deadline = time.monotonic() + min(head.timeout_s, REPLY_S_MAX)
        request = frames.parse_request(head, wire.read(head.body_bytes))
        try:
            block_ids = self._readable(request)
            codec = self._exports.codecs.find(head.codec)
            if codec is not None:
                self._check_digests(request, codec)
        except TransferError as error:
            wire.send([frames.refusal(head.seq, error)])
            return
        reply = frames.reply(head.seq, head.count)
        if codec is None:
            self._send_blocks(wire, reply, block_ids, deadline)
        else:
            self._send_encoded(wire, reply, block_ids, codec, deadline)
        wire.send([frames.trailer(head.seq, self._gone(request))])

    def _send_blocks(self, wire: Wire, reply: bytes, block_ids: list[int], deadline: float) -> None:
        size = self._exports.arena.block_bytes
        span_blocks = max(1, SPAN_BYTES // size)
        buffers: list[Buffer] = [reply]
        for first in range(0, max(1, len(block_ids)), span_blocks):
            _check_time(deadline)
            span = block_ids[first : first + span_blocks]
            runs = coalesce(span, span, span_blocks)
            buffers += [self._flat[start * size : (start + count) * size] for _, start, _, count in runs]
            wire.send(buffers)
            buffers = []

    def _send_encoded(self, wire: Wire, reply: bytes, block_ids: list[int], codec: Codec, deadline: float) -> None:
        blocks, size = self._exports.arena.bytes_view(), frames.group_blocks(self._exports.arena.block_bytes)
        buffers: list[Buffer] = [reply]
        for first in range(0, max(1, len(block_ids)), size):
            _check_time(deadline)
            encodings = encode_blocks(codec, blocks, block_ids[first : first + size])
            buffers.append(frames.table([(encoding.data.nbytes, encoding.digest) for encoding in encodings]))
            wire.send([*buffers, *(encoding.data.data for encoding in encodings)])
            buffers = []

    def _check_digests(self, request: Request, codec: Codec) -> None:
        columns = (request.indices.tolist(), request.block_ids.tolist(), request.digests.tolist())
        try:
            check_before(codec, self._exports.arena.bytes_view(), list(zip(*columns, strict=True)))
        except DigestMismatchError:
            gone = self._gone(request)  # bytes of a later owner are not corrupted, they are another's
            if gone:
                raise BlocksGoneError(gone) from None
            raise

    def _readable(self, request: Request) -> list[int]:
        """The blocks to send. Raises what `refusal` can say."""
        head, size = request.head, self._exports.arena.block_bytes
        if head.block_bytes != size:
            raise LayoutMismatchError(f"block_bytes differs: {size} here, {head.block_bytes} there")
        block_ids: list[int] = request.block_ids.tolist()
        self._exports.check_readable(request.key, head.epoch, list(zip(block_ids, request.generations.tolist(), strict=True)))
        gone = self._gone(request)
        if gone:
            raise BlocksGoneError(gone)
        return block_ids

    def _gone(self, request: Request) -> list[int]:
        changed = self._exports.arena.generations[request.block_ids] != request.generations
        return [int(index) for index in request.indices[np.flatnonzero(changed)]]


def _check_time(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise TransferError("its time ran out in mid-reply: it reads too slowly")


def _listen(bind: str) -> tuple[str, socket.socket]:
    host, _, port = bind.rpartition(":")
    host = host.strip("[]")
    try:
        if not 0 <= int(port) < 2**16:
            raise ValueError("no such port")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return host, socket.create_server((host, int(port)), family=family, backlog=128)
    except (OSError, ValueError) as error:
        raise ConfigError(f"transfer.tcp.bind: cannot listen at {bind}: {error}; give HOST:PORT, port 0 for any") from None


def _shutdown(listener: socket.socket) -> None:
    try:
        listener.shutdown(socket.SHUT_RDWR)  # wakes the thread in accept
    except OSError:
        return
