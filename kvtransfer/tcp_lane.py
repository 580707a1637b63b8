"""One connection of the pulling side, and the job that several of them work on, each in a thread of its own."""

from __future__ import annotations

import socket
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from core.blocks import BlockRecord, KvSource
from core.errors import DigestMismatchError, TransferError
from core.request import AttemptKey
from kvtransfer import tcp_frames as frames
from kvtransfer.arena import Blocks
from kvtransfer.codec import RAW, check_digest
from kvtransfer.codecs import Codec
from kvtransfer.encoded import Encoding, check_length, decode_block
from kvtransfer.encoding_error import EncodingError
from kvtransfer.spans import coalesce
from kvtransfer.tcp_wire import HANDSHAKE_S, Security, Wire, introduce, tune

PART_BYTES_MAX = 32 * 2**20  # of one request; with 8 MiB the source spends half as much processor time again on requests
SHARE_BYTES_MIN = 8 * 2**20  # a second connection for less does not pay for waking its thread
DECODED_SHARE_BYTES_MIN = 2**20  # but where the bytes are worth a second processor
DIGEST_SPAN_BYTES = 2**20  # received, then digested while still in the core's cache
AHEAD = 2  # requests on their way at a time, so that the source never waits for the next one


@dataclass(frozen=True, slots=True)
class Part:
    """What one request asks for."""

    records: Sequence[BlockRecord]
    dest_blocks: Sequence[int]


class Job:
    """One pull, cut into as many parts for each of its lanes, which take them until none is left or one has failed."""

    def __init__(
        self,
        source: KvSource,
        key: AttemptKey,
        records: Sequence[BlockRecord],
        dest_blocks: Sequence[int],
        dest: Blocks,
        *,
        digest: bool,
        timeout_s: float,
        lanes_max: int,
        codec: Codec | None = None,
    ) -> None:
        self.source = source
        self.key = key
        self.dest = dest
        self.digest = digest
        self.timeout_s = timeout_s
        self.codec = codec
        self.encoded_bytes = 0
        self.error: TransferError | None = None
        """The first one; what follows it are its consequences."""
        size_bytes = len(records) * int(dest.shape[1])
        self.num_lanes = max(1, min(lanes_max, size_bytes // (DECODED_SHARE_BYTES_MIN if codec else SHARE_BYTES_MIN)))
        rounds = max(1, -(-size_bytes // (PART_BYTES_MAX * self.num_lanes)))
        size = max(1, min(frames.BLOCKS_MAX, -(-len(records) // (rounds * self.num_lanes))))
        starts = range(0, max(1, len(records)), size)
        self._parts = deque(Part(records[start : start + size], dest_blocks[start : start + size]) for start in starts)
        self._lock = threading.Lock()

    def take(self) -> Part | None:
        with self._lock:
            return None if self.error is not None or not self._parts else self._parts.popleft()

    def count(self, encoded_bytes: int) -> None:
        with self._lock:
            self.encoded_bytes += encoded_bytes

    def fail(self, error: TransferError) -> None:
        with self._lock:
            self.error = self.error or error


class Lane:
    """A connection to one incarnation of a source, dialled on first use. A lane that failed is of no use any more."""

    def __init__(self, source: KvSource, security: Security, timeout_s: float) -> None:
        self._source = source
        self._security = security
        self._timeout_s = timeout_s
        self._wire: Wire | None = None
        self._aborted = False
        self._lock = threading.Lock()
        self._seqs = count(1)
        self._trailer = memoryview(bytearray(frames.REPLY_HEAD_BYTES))
        self._encoded = np.empty(0, np.uint8)  # one group of encodings; grows to the largest

    def work(self, job: Job) -> None:
        """Moves parts of `job` until none is left. Raises TransferError, after the job has been told."""
        try:
            self._move(self._dialled(), job)
        except TransferError as error:
            job.fail(error)
            raise
        except OSError as error:
            broke = TransferError(f"the connection to {self._source.worker_id} at {self._source.tcp_address} broke: {error}")
            job.fail(broke)
            raise broke from None

    def usable(self) -> bool:
        """Of a lane nobody works on."""
        return self._wire is not None and not self._aborted and self._wire.quiet()

    def abort(self) -> None:
        """From any thread: whoever works here fails soon, dialling included."""
        with self._lock:
            self._aborted = True
            if self._wire is not None:
                self._wire.abort()

    def close(self) -> None:
        """Of a lane nobody works on. Idempotent."""
        with self._lock:
            self._aborted = True
            if self._wire is not None:
                self._wire.close()

    def _dialled(self) -> Wire:
        if self._wire is not None:
            return self._wire
        family, kind, protocol, _, address = _resolved(self._source.tcp_address)
        sock = socket.socket(family, kind, protocol)
        wire = Wire(sock)
        with self._lock:
            if self._aborted:
                sock.close()
                raise TransferError("the pull was given up")
            self._wire = wire
        tune(sock)
        sock.settimeout(min(HANDSHAKE_S, self._timeout_s))
        try:
            sock.connect(address)
            introduce(wire, self._source.epoch, self._security)
        except TimeoutError:
            raise TransferError(
                f"{self._source.worker_id} does not answer at {self._source.tcp_address}; raise"
                " transfer.pull_timeout_s if the link is that slow"
            ) from None
        if self._aborted:  # meanwhile, where it could not wake us
            raise TransferError("the pull was given up")
        wire.set_deadlines(self._timeout_s, self._timeout_s)
        return wire

    def _move(self, wire: Wire, job: Job) -> None:
        asked: deque[tuple[int, Part]] = deque()
        while True:
            while len(asked) < AHEAD and (part := job.take()) is not None:
                asked.append((self._ask(wire, job, part), part))
            if not asked:
                return
            self._receive(wire, job, *asked.popleft())

    def _ask(self, wire: Wire, job: Job, part: Part) -> int:
        seq = next(self._seqs) % 2**32
        places: list[tuple[int, ...]]
        if job.codec is None:
            codec, places = RAW, [(record.index, record.block_id, record.generation) for record in part.records]
        else:
            codec = job.codec.name
            places = [(record.index, record.block_id, record.generation, record.digest) for record in part.records]
        wire.send([frames.request(seq, job.timeout_s, self._source.epoch, int(job.dest.shape[1]), job.key, places, codec)])
        return seq

    def _receive(self, wire: Wire, job: Job, seq: int, part: Part) -> None:
        self._check(wire, wire.read(frames.REPLY_HEAD_BYTES), frames.REPLY_MAGIC, seq, len(part.records))
        corrupted = (
            self._receive_plain(wire, job, part) if job.codec is None else self._receive_encoded(wire, job, job.codec, part)
        )
        # First the trailer: bytes of a later owner are not corrupted, they are another's.
        self._check(wire, self._trailer, frames.TRAILER_MAGIC, seq, 0)
        if corrupted is not None:
            raise corrupted

    def _receive_plain(self, wire: Wire, job: Job, part: Part) -> DigestMismatchError | None:
        corrupted: DigestMismatchError | None = None
        behind = len(part.records) * int(job.dest.shape[1]) + len(self._trailer)
        for span, last in _spans(part, DIGEST_SPAN_BYTES if job.digest else PART_BYTES_MAX, job.dest):
            views = _views(job.dest, span.dest_blocks)
            if last:
                views.append(self._trailer)  # one system call, and one waking up, for both
            behind -= sum(map(len, views))
            wire.receive(views, behind)
            if job.digest and corrupted is None:
                corrupted = _corrupted(job.dest, span)
        return corrupted

    def _receive_encoded(self, wire: Wire, job: Job, codec: Codec, part: Part) -> TransferError | None:
        """Group by group: the source encodes the next one while this one is decoded into its blocks."""
        failed: TransferError | None = None
        for span, last in _spans(part, frames.GROUP_BYTES, job.dest):
            table = frames.parse_table(wire.read(frames.table_bytes(len(span.records))))
            for record, (length, _) in zip(span.records, table, strict=True):
                check_length(codec, length, record.index)
            group = self._group(sum(length for length, _ in table))
            wire.receive([group.data, self._trailer] if last else [group.data])
            job.count(group.nbytes)
            if failed is None:
                failed = _undecodable(job, codec, span, table, group)
        return failed

    def _group(self, size: int) -> Blocks:
        if self._encoded.nbytes < size:
            self._encoded = np.empty(size, np.uint8)
        return self._encoded[:size]

    def _check(self, wire: Wire, data: memoryview, magic: bytes, seq: int, expected: int) -> None:
        head = frames.parse_reply_head(data, magic, seq)
        if head.status is not frames.Status.OK:
            raise frames.error_of(head, wire.read(head.detail_bytes), self._source.worker_id)
        if head.count != expected or head.detail_bytes:
            raise frames.FrameError(f"{self._source.worker_id} answered with {head.count} blocks, asked for were {expected}")


def _spans(part: Part, span_bytes: int, dest: Blocks) -> Iterator[tuple[Part, bool]]:
    """At least one, and whether it is the last."""
    size, total = max(1, span_bytes // int(dest.shape[1])), len(part.records)
    for start in range(0, max(1, total), size):
        yield Part(part.records[start : start + size], part.dest_blocks[start : start + size]), start + size >= total


def _views(dest: Blocks, dest_blocks: Sequence[int]) -> list[memoryview]:
    """The destination itself, neighbours as one."""
    runs = coalesce(dest_blocks, dest_blocks, len(dest_blocks))
    return [dest[start : start + length].reshape(-1).data for _, start, _, length in runs]


def _corrupted(dest: Blocks, span: Part) -> DigestMismatchError | None:
    try:
        for record, block in zip(span.records, span.dest_blocks, strict=True):
            check_digest(dest[block], record.digest, record.index)
    except DigestMismatchError as error:
        return error
    return None


def _undecodable(job: Job, codec: Codec, span: Part, table: list[tuple[int, int]], group: Blocks) -> TransferError | None:
    start = 0
    try:
        for record, block, (length, digest) in zip(span.records, span.dest_blocks, table, strict=True):
            encoding = Encoding(group[start : start + length], digest)
            decode_block(codec, encoding, job.dest[block], record, digest=job.digest)
            start += length
    except (DigestMismatchError, EncodingError) as error:
        return error
    return None


def _resolved(address: str) -> tuple[socket.AddressFamily, socket.SocketKind, int, str, Any]:
    host, _, port = address.rpartition(":")
    try:
        if not 0 < int(port) < 2**16:
            raise ValueError("no such port")
        return socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
    except (OSError, ValueError) as error:
        raise TransferError(f"{address!r} leads nowhere: {error}") from None
