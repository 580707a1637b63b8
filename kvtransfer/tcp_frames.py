"""What two ends say to each other over raw sockets, byte by byte. Deciding code: bytes in, values out, nothing waits.

    server  GREETING  magic, version, nonce
    client  HELLO     magic, version, epoch, nonce, proof
    server  WELCOME   status, epoch, proof
    client  REQUEST   magic, seq, timeout, epoch, block_bytes, codec, key, places (any number of these)
    server  REPLY     magic, seq, status, count; the blocks' bytes in the order asked for; TRAILER: magic, seq, status

With a codec other than raw, places carry the announced digests as well, and the blocks come in groups of `group_blocks`:
a table of lengths and digests of the encodings, then the encodings.

A reply that is not OK carries its reason and no bytes. The trailer says whether the blocks still were of their generation
once the last byte had been taken out of the arena. Proofs are HMAC-SHA256 over both nonces and the epoch, keyed with the
shared secret (empty when there is none), so that neither end serves or believes a stranger and no recording can be played
back. Integers are little-endian.

What the server says before blocks is padded to a multiple of 64 bytes: then they stand in the kernel's buffers as they
stand in the arena, on the processor's cache lines, and are copied into them and out of them up to a fifth quicker.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from hashlib import sha256
from itertools import chain

import numpy as np
import numpy.typing as npt

from core.errors import (
    DigestMismatchError,
    LayoutMismatchError,
    LeaseExpiredError,
    StaleEpochError,
    TandemError,
    TransferError,
)
from core.request import AttemptKey
from kvtransfer.codec import RAW
from kvtransfer.transport import BlocksGoneError

VERSION = 3
BLOCKS_MAX = 1024  # of one request: as many buffers as one system call takes
REQUEST_ID_BYTES_MAX = 4096
DETAIL_BYTES_MAX = 4 * BLOCKS_MAX
NONCE_BYTES = 16
GROUP_BYTES = 2**20  # of plain bytes; encoded, sent and decoded at a time

_GREETING = struct.Struct("<4sHxx16s")
_HELLO = struct.Struct("<4sHxxQ16s32s")
_WELCOME = struct.Struct("<BxxxQ32s60x")
_REQUEST = struct.Struct("<4sIIIQQ8sII")
_REPLY = struct.Struct("<4sIBxxxII44x")
_PLACE = np.dtype([("index", "<u4"), ("block_id", "<u4"), ("generation", "<u8")])
_PLACE_TO_ENCODE = np.dtype([*_PLACE.descr, ("digest", "<u8")])
_ENCODING = np.dtype([("length", "<u4"), ("digest", "<u8")])

GREETING_BYTES, HELLO_BYTES, WELCOME_BYTES = _GREETING.size, _HELLO.size, _WELCOME.size
REQUEST_HEAD_BYTES, REPLY_HEAD_BYTES = _REQUEST.size, _REPLY.size
REQUEST_BODY_BYTES_MAX = REQUEST_ID_BYTES_MAX + BLOCKS_MAX * _PLACE_TO_ENCODE.itemsize

_HELLO_MAGIC, _REQUEST_MAGIC, REPLY_MAGIC, TRAILER_MAGIC = b"TKVB", b"TKVR", b"TKVA", b"TKVZ"

Buffer = bytes | bytearray | memoryview


class FrameError(TransferError):
    """The peer said something that is not this protocol; the connection is of no use any more."""


class Status(IntEnum):
    OK = 0
    FAILED = 1
    GONE = 2
    STALE_EPOCH = 3
    LEASE_EXPIRED = 4
    LAYOUT = 5
    DENIED = 6
    DIGEST = 7


_KINDS: dict[Status, type[TransferError]] = {
    Status.STALE_EPOCH: StaleEpochError,
    Status.LEASE_EXPIRED: LeaseExpiredError,
    Status.LAYOUT: LayoutMismatchError,
    Status.DIGEST: DigestMismatchError,
}


@dataclass(frozen=True, slots=True)
class RequestHead:
    seq: int
    timeout_s: float
    epoch: int
    block_bytes: int
    attempt: int
    codec: str
    id_bytes: int
    count: int

    @property
    def body_bytes(self) -> int:
        return self.id_bytes + self.count * _places_of(self.codec).itemsize


@dataclass(frozen=True, slots=True)
class Request:
    head: RequestHead
    key: AttemptKey
    indices: npt.NDArray[np.uint32]
    block_ids: npt.NDArray[np.uint32]
    generations: npt.NDArray[np.uint64]
    digests: npt.NDArray[np.uint64]
    """Announced ones; empty for raw, where only the far end needs them."""


@dataclass(frozen=True, slots=True)
class ReplyHead:
    seq: int
    status: Status
    count: int
    detail_bytes: int


# -- getting to know each other ------------------------------------------------------------------------------------


def greeting(nonce: bytes) -> bytes:
    return _GREETING.pack(_HELLO_MAGIC, VERSION, nonce)


def parse_greeting(data: Buffer) -> bytes:
    """The server's nonce."""
    magic, version, nonce = _GREETING.unpack(data)
    _check_version(magic, version)
    return bytes(nonce)


def hello(epoch: int, secret: bytes, server_nonce: bytes, nonce: bytes) -> bytes:
    return _HELLO.pack(_HELLO_MAGIC, VERSION, epoch, nonce, _proof(b"client", secret, server_nonce, nonce, epoch))


def parse_hello(data: Buffer, secret: bytes, server_nonce: bytes) -> tuple[int, bytes]:
    """(the epoch that is believed in, the client's nonce). Raises FrameError for a client without the secret."""
    magic, version, epoch, nonce, proof = _HELLO.unpack(data)
    _check_version(magic, version)
    if not hmac.compare_digest(proof, _proof(b"client", secret, server_nonce, nonce, epoch)):
        raise FrameError("a client without our secret; set transfer.tcp.secret_file alike on all workers")
    return epoch, bytes(nonce)


def welcome(status: Status, epoch: int, secret: bytes, server_nonce: bytes, nonce: bytes) -> bytes:
    return _WELCOME.pack(status, epoch, _proof(b"server", secret, server_nonce, nonce, epoch))


def check_welcome(data: Buffer, expected_epoch: int, secret: bytes, server_nonce: bytes, nonce: bytes) -> None:
    """Raises StaleEpochError, and FrameError when either end does not know the secret."""
    number, epoch, proof = _WELCOME.unpack(data)
    status = _status(number)
    if status is Status.DENIED or not hmac.compare_digest(proof, _proof(b"server", secret, server_nonce, nonce, epoch)):
        raise FrameError("the source has another secret; set transfer.tcp.secret_file alike on all workers")
    if status is Status.STALE_EPOCH:
        raise StaleEpochError(f"the source is of epoch {epoch}, the ticket of epoch {expected_epoch}")
    if status is not Status.OK:
        raise FrameError(f"the source answered the handshake with {status.name}")


# -- asking --------------------------------------------------------------------------------------------------------


def request(
    seq: int,
    timeout_s: float,
    epoch: int,
    block_bytes: int,
    key: AttemptKey,
    places: Sequence[tuple[int, ...]],
    codec: str = RAW,
) -> bytes:
    """`places`: (index, block id, generation) of up to BLOCKS_MAX blocks, and with a codec their digests.

    Raises TransferError for an id that is too long.
    """
    assert len(places) <= BLOCKS_MAX, "cut the request into parts"
    name = key.request_id.encode()
    if len(name) > REQUEST_ID_BYTES_MAX:
        raise TransferError(f"a request id of {len(name)} bytes; tcp carries at most {REQUEST_ID_BYTES_MAX}")
    timeout_ms = min(2**32 - 1, max(1, int(timeout_s * 1000)))
    head = _REQUEST.pack(
        _REQUEST_MAGIC, seq, timeout_ms, key.attempt, epoch, block_bytes, codec.encode("ascii"), len(name), len(places)
    )
    row = "IIQ" if codec == RAW else "IIQQ"  # as in _places_of; struct takes a third of the time of numpy here
    return head + name + struct.pack("<" + row * len(places), *chain.from_iterable(places))


def parse_request_head(data: Buffer) -> RequestHead:
    """Bounds everything that is still to be read. Raises FrameError."""
    magic, seq, timeout_ms, attempt, epoch, block_bytes, codec, id_bytes, count = _REQUEST.unpack(data)
    if magic != _REQUEST_MAGIC or id_bytes > REQUEST_ID_BYTES_MAX or count > BLOCKS_MAX or not timeout_ms:
        raise FrameError(f"not a request: {bytes(data[:32]).hex()}")
    name = codec.rstrip(b"\0").decode("ascii", "replace")
    return RequestHead(seq, timeout_ms / 1000, epoch, block_bytes, attempt, name, id_bytes, count)


def parse_request(head: RequestHead, body: Buffer) -> Request:
    """`body` holds `head.body_bytes` bytes; the arrays are its own copies."""
    try:
        key = AttemptKey(bytes(body[: head.id_bytes]).decode(), head.attempt)
    except UnicodeDecodeError:
        raise FrameError("a request id that is no UTF-8") from None
    kind = _places_of(head.codec)
    places = np.frombuffer(body, kind, head.count, head.id_bytes) if head.count else np.empty(0, kind)
    digests = places["digest"].copy() if kind is _PLACE_TO_ENCODE else np.empty(0, np.uint64)
    return Request(head, key, places["index"].copy(), places["block_id"].copy(), places["generation"].copy(), digests)


def _places_of(codec: str) -> np.dtype[np.void]:
    return _PLACE if codec == RAW else _PLACE_TO_ENCODE


# -- answering -----------------------------------------------------------------------------------------------------


def reply(seq: int, count: int) -> bytes:
    """The head of a reply that `count` blocks follow."""
    return _REPLY.pack(REPLY_MAGIC, seq, Status.OK, count, 0)


def group_blocks(block_bytes: int) -> int:
    """How many encoded blocks stand behind one table, the last one's fewer."""
    return max(1, GROUP_BYTES // block_bytes)


def table(encodings: Sequence[tuple[int, int]]) -> bytes:
    """Of the group that follows: (length, digest) of each encoding."""
    return np.array(encodings, _ENCODING).tobytes()


def table_bytes(count: int) -> int:
    return count * _ENCODING.itemsize


def parse_table(data: Buffer) -> list[tuple[int, int]]:
    rows: list[tuple[int, int]] = np.frombuffer(data, _ENCODING).tolist()
    return rows


def refusal(seq: int, error: TandemError) -> bytes:
    """A whole reply that is no."""
    if isinstance(error, BlocksGoneError):
        return _reply_with(REPLY_MAGIC, seq, Status.GONE, _indices(error.indices))
    status = next((status for status, kind in _KINDS.items() if isinstance(error, kind)), Status.FAILED)
    return _reply_with(REPLY_MAGIC, seq, status, error.message.encode()[:DETAIL_BYTES_MAX])


def trailer(seq: int, gone: Sequence[int]) -> bytes:
    """`gone`: indices of the blocks that changed while they were sent."""
    return _reply_with(TRAILER_MAGIC, seq, Status.GONE if gone else Status.OK, _indices(gone))


def parse_reply_head(data: Buffer, magic: bytes, seq: int) -> ReplyHead:
    """`magic`: REPLY_MAGIC or TRAILER_MAGIC, `seq`: of the oldest request not answered yet. Raises FrameError."""
    found, answered, number, count, detail_bytes = _REPLY.unpack(data)
    if found != magic or answered != seq or count > BLOCKS_MAX or detail_bytes > DETAIL_BYTES_MAX:
        raise FrameError(f"not the answer to request {seq}: {bytes(data).hex()}")
    return ReplyHead(answered, _status(number), count, detail_bytes)


def error_of(head: ReplyHead, detail: Buffer, peer: str) -> TransferError:
    """What a reply or trailer that is not OK means for the pull."""
    if head.status is Status.GONE:
        return BlocksGoneError(np.frombuffer(detail, "<u4", len(detail) // 4).tolist())
    return _KINDS.get(head.status, TransferError)(f"{peer}: {bytes(detail).decode(errors='replace')}")


def _reply_with(magic: bytes, seq: int, status: Status, detail: bytes) -> bytes:
    return _REPLY.pack(magic, seq, status, 0, len(detail)) + detail


def _indices(indices: Sequence[int]) -> bytes:
    return np.array(indices[:BLOCKS_MAX], "<u4").tobytes()


def _proof(who: bytes, secret: bytes, server_nonce: bytes, nonce: bytes, epoch: int) -> bytes:
    return hmac.new(secret, b"tandem-kv-tcp " + who + server_nonce + nonce + struct.pack("<Q", epoch), sha256).digest()


def _status(number: int) -> Status:
    try:
        return Status(number)
    except ValueError:
        raise FrameError(f"status {number} is not known here; run the same version everywhere") from None


def _check_version(magic: bytes, version: int) -> None:
    if magic != _HELLO_MAGIC:
        raise FrameError("the other end does not speak our transfer protocol; is the address right, and TLS set alike?")
    if version != VERSION:
        raise FrameError(f"the other end speaks version {version} of the transfer protocol, this one {VERSION}")
