"""Transport through the source's Kv/Read: slower than memory, reaches everything a connection reaches."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import grpc
import numpy as np

from core.blocks import BlockRecord, KvSource
from core.errors import TransferError
from core.request import AttemptKey
from core.wire import key_to_pb, record_to_pb
from kvtransfer.arena import Blocks
from kvtransfer.channels import Channels
from kvtransfer.codec import check_digest
from kvtransfer.rpc import transfer_error
from kvtransfer.service import READ_BLOCKS_MAX
from kvtransfer.transport import PullResult, check_places, check_request
from tandem.cancelling import heed_cancellation
from tandem.v1 import kv_pb2


class GrpcTransport:
    name = "grpc"

    def __init__(self, dest: Blocks, channels: Channels, *, digest: bool, timeout_s: float) -> None:
        self._dest = dest
        self._channels = channels
        self._digest = digest
        self._timeout_s = timeout_s

    async def pull(
        self, source: KvSource, key: AttemptKey, records: Sequence[BlockRecord], dest_blocks: Sequence[int]
    ) -> PullResult:
        check_request(records, dest_blocks, self._dest)
        check_places(records, source.num_blocks)
        started = time.perf_counter()
        try:
            async with asyncio.timeout(self._timeout_s):
                for first in range(0, max(1, len(records)), READ_BLOCKS_MAX):
                    part = slice(first, first + READ_BLOCKS_MAX)
                    await self._read(source, key, records[part], dest_blocks[part])
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
        return PullResult(len(records) * int(self._dest.shape[1]), time.perf_counter() - started)

    def forget(self, source: KvSource) -> None:
        self._channels.forget(source)

    async def close(self) -> None:
        """The channels are their owner's to close."""

    async def _read(
        self, source: KvSource, key: AttemptKey, records: Sequence[BlockRecord], dest_blocks: Sequence[int]
    ) -> None:
        request = kv_pb2.ReadRequest(
            key=key_to_pb(key), epoch=source.epoch, blocks=[record_to_pb(record) for record in records]
        )
        sink = _Sink(self._dest, records, dest_blocks, self._digest)
        call = self._channels.stub(source).Read(request, timeout=self._timeout_s)
        try:
            async for chunk in call:
                sink.write(chunk.data)
        finally:
            call.cancel()  # nothing once it has ended
        sink.end()


class _Sink:
    """Lays a stream of bytes into the destination blocks, in order, checking each as it becomes whole."""

    def __init__(self, dest: Blocks, records: Sequence[BlockRecord], dest_blocks: Sequence[int], digest: bool) -> None:
        self._dest = dest
        self._records = records
        self._dest_blocks = dest_blocks
        self._digest = digest
        self._place = 0
        self._filled = 0

    def write(self, data: bytes) -> None:
        left = np.frombuffer(data, np.uint8)
        while left.size:
            if self._place == len(self._records):
                raise TransferError(f"{left.size} bytes more than asked for; the source has blocks of another size")
            block = self._dest[self._dest_blocks[self._place]]
            taken = min(left.size, block.size - self._filled)
            block[self._filled : self._filled + taken] = left[:taken]
            left = left[taken:]
            self._filled += taken
            if self._filled == block.size:
                self._whole(block)

    def end(self) -> None:
        if self._place != len(self._records):
            raise TransferError(f"the stream ended in block {self._records[self._place].index}; the source cut it short")

    def _whole(self, block: Blocks) -> None:
        record = self._records[self._place]
        if self._digest:
            check_digest(block, record.digest, record.index)
        self._place += 1
        self._filled = 0
