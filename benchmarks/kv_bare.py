"""What sockets and grpc.aio give in Python with nothing of ours around them: the yardsticks of `tcp` and `grpc`."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import grpc
import numpy as np

from kvtransfer.arena import Blocks

IOV_MAX = 1024
MIB = 2**20
CHUNKS = (MIB // 4, MIB // 2, MIB, 2 * MIB, 4 * MIB)
METHOD = "/bare.Bytes/Read"
_ANY_SIZE = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))
GRPC_OPTIONS = {  # by how the channel is set up
    "as it comes": _ANY_SIZE,
    "large frames": (*_ANY_SIZE, ("grpc.http2.max_frame_size", 16 * MIB - 1), ("grpc.http2.lookahead_bytes", 64 * MIB)),
}


def serve_sockets(views: list[memoryview]) -> socket.socket:
    """Sends blocks from `views` to whoever connects, from threads that end with the listener that is returned."""
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_accept, args=(listener, views), daemon=True).start()
    return listener


def _accept(listener: socket.socket, views: list[memoryview]) -> None:
    while True:
        try:
            sock, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_send, args=(sock, views), daemon=True).start()


def _send(sock: socket.socket, views: list[memoryview]) -> None:
    """Two numbers of four bytes come in, first and last block; those blocks go out, nothing else."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with sock:
        while order := sock.recv(8, socket.MSG_WAITALL):
            left = views[int.from_bytes(order[:4]) : int.from_bytes(order[4:])]
            while left:
                left = _rest(left, sock.sendmsg(left[:IOV_MAX]))


def _receive(sock: socket.socket, dest: Blocks, first: int, last: int) -> None:
    sock.sendall(first.to_bytes(4) + last.to_bytes(4))
    left = [dest[block].data for block in range(first, last)]
    while left:
        left = _rest(left, sock.recvmsg_into(left[:IOV_MAX], 0, socket.MSG_WAITALL)[0])


def _rest(views: list[memoryview], done: int) -> list[memoryview]:
    while views and done >= len(views[0]):
        whole = max(1, min(len(views), done // len(views[0])))
        done -= sum(map(len, views[:whole]))
        views = views[whole:]
    return [views[0][done:], *views[1:]] if done else views


class BareSockets:
    """As many connections as a pull uses, each with a thread, and an equal share of the blocks for each."""

    def __init__(self, port: int, dest: Blocks, connections: int) -> None:
        self._sockets = [socket.create_connection(("127.0.0.1", port)) for _ in range(connections)]
        self._threads = ThreadPoolExecutor(connections)
        self._dest = dest

    async def pull(self, count: int) -> None:
        await asyncio.to_thread(self._pull, count)

    def _pull(self, count: int) -> None:
        bounds = [count * n // len(self._sockets) for n in range(len(self._sockets) + 1)]
        jobs = [
            self._threads.submit(_receive, sock, self._dest, *part)
            for sock, part in zip(self._sockets, pairwise(bounds), strict=True)
        ]
        for job in jobs:
            job.result(60)

    def close(self) -> None:
        for sock in self._sockets:
            sock.close()
        self._threads.shutdown()


async def serve_grpc(data: bytes, options: Iterable[tuple[str, int]]) -> tuple[grpc.aio.Server, int]:
    """Streams pieces of `data` as raw bytes, no message around them: (server, port)."""

    async def read(request: bytes, context: object) -> AsyncIterator[bytes]:
        size, chunk = map(int, request.split())
        for at in range(0, size, chunk):
            yield data[at : min(at + chunk, size)]

    server = grpc.aio.server(options=list(options))
    _, service, method = METHOD.split("/")
    handlers = {method: grpc.unary_stream_rpc_method_handler(read)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, port


class BareGrpc:
    def __init__(self, port: int, dest: Blocks, options: Iterable[tuple[str, int]]) -> None:
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=list(options))
        self._read = self._channel.unary_stream(METHOD)
        self._flat = dest.reshape(-1)

    async def pull(self, size: int, chunk: int) -> None:
        at = 0
        async for data in self._read(b"%d %d" % (size, chunk)):
            self._flat[at : at + len(data)] = np.frombuffer(data, np.uint8)
            at += len(data)
        assert at == size, f"{at} bytes of {size} came"

    async def close(self) -> None:
        await self._channel.close()
