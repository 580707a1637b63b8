"""What a wire reads, however the bytes come: in crumbs, in one piece, or not all of them."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pytest

from kvtransfer.tcp_wire import LOCAL_QUEUE_BYTES, WAKE_BYTES, WAKE_BYTES_MIN, Wire, tune_local

HEAD = b"h" * 64
SIZES = (
    1,
    WAKE_BYTES_MIN,
    2 * WAKE_BYTES_MIN - 1,
    2 * WAKE_BYTES_MIN,
    WAKE_BYTES,
    2 * WAKE_BYTES + 1,
    9 * WAKE_BYTES,
)


@contextmanager
def connection() -> Iterator[tuple[socket.socket, Wire]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        far = socket.create_connection(listener.getsockname())
        near, _ = listener.accept()
    wire = Wire(near)
    wire.set_deadlines(10.0, 10.0)
    with far:
        yield far, wire
    wire.close()


def crumbs(far: socket.socket, data: bytes, rng: random.Random) -> threading.Thread:
    """Sends `data` in pieces of very different sizes."""

    def send() -> None:
        at = 0
        while at < len(data):
            size = int(2 ** rng.uniform(8, 21))
            far.sendall(data[at : at + size])
            at += size

    thread = threading.Thread(target=send)
    thread.start()
    return thread


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "size",
    [
        1,
        WAKE_BYTES_MIN - 1,
        WAKE_BYTES_MIN,
        2 * WAKE_BYTES_MIN - 1,
        2 * WAKE_BYTES_MIN,
        WAKE_BYTES,
        2 * WAKE_BYTES + 1,
        9 * WAKE_BYTES,
    ],
)
def test_what_is_asked_for_arrives_and_the_next_small_frame_too(size: int, seed: int) -> None:
    rng = random.Random(seed)
    data = np.random.default_rng(seed).integers(0, 256, size, np.uint8).tobytes()
    cuts = sorted({0, size, *(rng.randrange(size) for _ in range(rng.randrange(40)))})
    last = rng.randrange(len(cuts))  # the cuts before it are one call, those after it another
    with connection() as (far, wire):
        sender = crumbs(far, HEAD + data + HEAD, rng)
        assert bytes(wire.read(len(HEAD))) == HEAD
        got = bytearray(size)
        views = [memoryview(got)[start:stop] for start, stop in pairwise(cuts)]
        wire.receive(views[:last], behind=sum(map(len, views[last:])))
        wire.receive(views[last:])
        assert got == data
        assert bytes(wire.read(len(HEAD))) == HEAD
        sender.join()


def test_a_stream_that_ends_while_much_is_waited_for_is_an_error_at_once() -> None:
    with connection() as (far, wire):
        far.sendall(bytes(1000))
        far.shutdown(socket.SHUT_WR)
        with pytest.raises(ConnectionError, match="ended"):
            wire.receive([memoryview(bytearray(8 * WAKE_BYTES))])


def test_a_wait_for_much_ends_when_the_wire_is_aborted() -> None:
    with connection() as (far, wire):
        far.sendall(bytes(1000))
        stopper = threading.Timer(0.05, wire.abort)
        stopper.start()
        with pytest.raises(ConnectionError):
            wire.receive([memoryview(bytearray(8 * WAKE_BYTES))])
        stopper.join()


def test_few_bytes_queue_towards_a_peer_of_this_machine() -> None:
    with connection() as (far, _):
        tune_local(far)
        assert far.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) <= 2 * LOCAL_QUEUE_BYTES
    tune_local(far)  # closed: nothing to tune, and no error
