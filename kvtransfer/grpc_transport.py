"""Transport through the source's Kv/Read: slower than memory, reaches everything a connection reaches."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
from google.protobuf.message import DecodeError

from core.blocks import BlockRecord, KvSource
from core.errors import TransferError
from core.request import AttemptKey
from core.wire import key_to_pb
from kvtransfer.arena import Blocks
from kvtransfer.channels import Channels
from kvtransfer.codec import RAW, check_digest
from kvtransfer.codecs import Codec, Codecs
from kvtransfer.copier import settled
from kvtransfer.encoded import Encoding, check_length, decode_block
from kvtransfer.encoding_error import EncodingError
from kvtransfer.raw_chunk import data_of
from kvtransfer.rpc import transfer_error
from kvtransfer.service import READ_BLOCKS_MAX
from kvtransfer.transport import PullResult, check_places, check_request
from tandem.cancelling import heed_cancellation
from tandem.v1 import kv_pb2

_DECODERS = 2  # threads


class GrpcTransport:
    name = "grpc"

    def __init__(
        self, dest: Blocks, channels: Channels, *, digest: bool, timeout_s: float, codecs: Codecs | None = None
    ) -> None:
        self._dest = dest
        self._channels = channels
        self._digest = digest
        self._timeout_s = timeout_s
        self._codecs = codecs or Codecs()
        self._pool = ThreadPoolExecutor(_DECODERS, thread_name_prefix="kv-decode")

    async def pull(
        self, source: KvSource, key: AttemptKey, records: Sequence[BlockRecord], dest_blocks: Sequence[int], codec: str = RAW
    ) -> PullResult:
        check_request(records, dest_blocks, self._dest)
        check_places(records, source.num_blocks)
        started, made, wire_bytes = time.perf_counter(), self._codecs.find(codec), 0
        try:
            async with asyncio.timeout(self._timeout_s):
                for first in range(0, max(1, len(records)), READ_BLOCKS_MAX):
                    part = slice(first, first + READ_BLOCKS_MAX)
                    request = kv_pb2.ReadRequest(
                        key=key_to_pb(key),
                        epoch=source.epoch,
                        indices=[record.index for record in records[part]],
                        block_ids=[record.block_id for record in records[part]],
                        generations=[record.generation for record in records[part]],
                        digests=[] if made is None else [record.digest for record in records[part]],
                        codec="" if made is None else codec,
                    )
                    if made is None:
                        await self._read_raw(source, request, _Sink(self._dest, records[part], dest_blocks[part], self._digest))
                        continue
                    sink = _DecodingSink(made, self._dest, records[part], dest_blocks[part], self._digest)
                    await self._read(source, request, sink)
                    wire_bytes += sink.bytes
        except TimeoutError:
            raise TransferError(
                f"{source.worker_id} did not send {len(records)} blocks within {self._timeout_s:g} s;"
                " raise transfer.pull_timeout_s if the link is that slow"
            ) from None
        except grpc.aio.AioRpcError as error:
            heed_cancellation()
            raise transfer_error(error, source.worker_id) from None
        except asyncio.CancelledError:
            heed_cancellation()
            # Not we were cancelled, the channel was closed.
            raise TransferError(f"the connection to {source.worker_id} was closed") from None
        return PullResult(len(records) * int(self._dest.shape[1]), time.perf_counter() - started, codec, wire_bytes)

    def forget(self, source: KvSource) -> None:
        self._channels.forget(source)

    async def close(self) -> None:
        """The channels are their owner's to close."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _read_raw(self, source: KvSource, request: kv_pb2.ReadRequest, sink: _Sink) -> None:
        call = self._channels.raw_read(source)(request, timeout=self._timeout_s)
        try:
            async for message in call:
                sink.write(data_of(message))
        except DecodeError:
            raise TransferError(f"{source.worker_id} sent something else than a chunk of blocks") from None
        finally:
            call.cancel()  # nothing once it has ended
        sink.end()

    async def _read(self, source: KvSource, request: kv_pb2.ReadRequest, sink: _DecodingSink) -> None:
        call = self._channels.stub(source).Read(request, timeout=self._timeout_s)
        try:
            async for chunk in call:
                await self._in_thread(sink, chunk)
        finally:
            call.cancel()  # nothing once it has ended
        sink.end()

    async def _in_thread(self, sink: _DecodingSink, chunk: kv_pb2.ReadChunk) -> None:
        """Comes back, however it ends, only when the thread does not write any more."""
        try:
            waiting = asyncio.wrap_future(self._pool.submit(sink.write, chunk))
        except RuntimeError:
            raise TransferError("the transport is closed") from None
        try:
            await asyncio.shield(waiting)
        finally:
            await settled(waiting)


class _Sink:
    """Lays a stream of bytes into the destination blocks, in order, checking each as it becomes whole."""

    def __init__(self, dest: Blocks, records: Sequence[BlockRecord], dest_blocks: Sequence[int], digest: bool) -> None:
        self._dest = dest
        self._flat = dest.reshape(-1).data  # of a memoryview: its slices cost a third of an array's
        self._records = records
        self._dest_blocks = dest_blocks
        self._digest = digest
        self._place = 0
        self._filled = 0

    def write(self, data: memoryview) -> None:
        size, at = int(self._dest.shape[1]), 0
        while at < len(data):
            if self._place == len(self._records):
                raise TransferError(f"{len(data) - at} bytes more than asked for; the source has blocks of another size")
            start = self._dest_blocks[self._place] * size + self._filled
            taken = min(len(data) - at, size - self._filled)
            self._flat[start : start + taken] = data[at : at + taken]
            at += taken
            self._filled += taken
            if self._filled == size:
                self._whole()

    def end(self) -> None:
        if self._place != len(self._records):
            raise TransferError(f"the stream ended in block {self._records[self._place].index}; the source cut it short")

    def _whole(self) -> None:
        if self._digest:
            record = self._records[self._place]
            check_digest(self._dest[self._dest_blocks[self._place]], record.digest, record.index)
        self._place += 1
        self._filled = 0


class _DecodingSink:
    """The same for encodings: what is announced is bounded first, then gathered, then decoded into its block."""

    def __init__(
        self, codec: Codec, dest: Blocks, records: Sequence[BlockRecord], dest_blocks: Sequence[int], digest: bool
    ) -> None:
        self.bytes = 0
        self._codec = codec
        self._dest = dest
        self._records = records
        self._dest_blocks = dest_blocks
        self._digest = digest
        self._announced: deque[tuple[int, int]] = deque()  # (length, digest) of those not whole yet
        self._known = 0
        self._place = 0
        self._part = bytearray()  # of an encoding whose rest is in a later chunk

    def write(self, chunk: kv_pb2.ReadChunk) -> None:
        """Raises EncodingError and DigestMismatchError."""
        self._announce(chunk)
        left = memoryview(chunk.data)
        self.bytes += len(left)
        while left:
            if not self._announced:
                raise EncodingError(f"{len(left)} bytes more than were announced")
            length, digest = self._announced[0]
            taken, left = left[: length - len(self._part)], left[length - len(self._part) :]
            if self._part or len(taken) < length:
                self._part += taken
                if len(self._part) < length:
                    return
                taken, self._part = memoryview(self._part), bytearray()
            self._announced.popleft()
            self._whole(Encoding(np.frombuffer(taken, np.uint8), digest))

    def end(self) -> None:
        if self._place != len(self._records):
            raise TransferError(f"the stream ended in block {self._records[self._place].index}; the source cut it short")

    def _announce(self, chunk: kv_pb2.ReadChunk) -> None:
        if self._known + len(chunk.begins) > len(self._records):
            raise EncodingError(f"more encodings than the {len(self._records)} asked for")
        for record, begin in zip(self._records[self._known :], chunk.begins, strict=False):
            check_length(self._codec, begin.length, record.index)
            self._announced.append((begin.length, begin.digest))
        self._known += len(chunk.begins)

    def _whole(self, encoding: Encoding) -> None:
        out = self._dest[self._dest_blocks[self._place]]
        decode_block(self._codec, encoding, out, self._records[self._place], digest=self._digest)
        self._place += 1
