"""gRPC channels to the sources of blocks, one per incarnation of a worker."""

from __future__ import annotations

import asyncio

import grpc

from core.blocks import KvSource
from core.service import KEEPALIVE_OPTIONS
from kvtransfer.reading import CHUNK_BYTES
from tandem.v1 import kv_pb2, kv_pb2_grpc

_OPTIONS = (
    *KEEPALIVE_OPTIONS,
    ("grpc.max_receive_message_length", 4 * CHUNK_BYTES),
    ("grpc.max_send_message_length", 4 * CHUNK_BYTES),
    ("grpc.http2.max_frame_size", 2 * CHUNK_BYTES),  # a chunk with its heads in one frame, a few of them on their way
    ("grpc.http2.lookahead_bytes", 4 * CHUNK_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 100),  # a source that is gone is given up after a few quick tries
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.use_local_subchannel_pool", 1),  # an incarnation's broken connection must not be met by the next one
)


class Channels:
    def __init__(self) -> None:
        self._channels: dict[tuple[str, int], grpc.aio.Channel] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def stub(self, source: KvSource) -> kv_pb2_grpc.KvStub:
        """The Kv service of `source`, dialled on first use. Channels to other incarnations at its address are closed."""
        return kv_pb2_grpc.KvStub(self._channel(source))  # type: ignore[no-untyped-call]

    def raw_read(self, source: KvSource) -> grpc.aio.UnaryStreamMultiCallable[kv_pb2.ReadRequest, bytes]:
        """`stub(source).Read` whose responses stay the bytes that came."""
        serialize = kv_pb2.ReadRequest.SerializeToString
        return self._channel(source).unary_stream("/tandem.v1.Kv/Read", serialize, response_deserializer=bytes)

    def collective(self, source: KvSource) -> kv_pb2_grpc.KvCollectiveStub:
        return kv_pb2_grpc.KvCollectiveStub(self._channel(source))  # type: ignore[no-untyped-call]

    def _channel(self, source: KvSource) -> grpc.aio.Channel:
        place = (source.grpc_address, source.epoch)
        channel = self._channels.get(place)
        if channel is None:
            for stale in [known for known in self._channels if known[0] == source.grpc_address]:
                self._drop(stale)
            channel = self._channels[place] = grpc.aio.insecure_channel(source.grpc_address, options=_OPTIONS)
        return channel

    def forget(self, source: KvSource) -> None:
        """Closes the channel to an incarnation that is gone; calls on it fail."""
        self._drop((source.grpc_address, source.epoch))

    async def close(self) -> None:
        for place in list(self._channels):
            self._drop(place)
        if self._closing:
            await asyncio.wait(self._closing, timeout=5.0)

    def _drop(self, place: tuple[str, int]) -> None:
        channel = self._channels.pop(place, None)
        if channel is None:
            return
        task = asyncio.create_task(channel.close(None), name=f"kv-channel-close {place[0]}")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
