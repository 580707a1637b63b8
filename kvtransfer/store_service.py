"""The Kv service of a store node: that of any node, and offers."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc

from core.wire import changes_to_pb, key_from_pb, layout_from_pb, record_from_pb, source_from_pb
from kvtransfer.kv_service import KvNodeServicer
from kvtransfer.rpc import abort
from kvtransfer.store_feed import StoreFeed
from kvtransfer.store_node import StoreNode
from kvtransfer.store_offers import Offer
from kvtransfer.store_plane import StorePlane
from tandem.errors import TandemError
from tandem.v1 import common_pb2, kv_pb2


class StoreServicer(KvNodeServicer):
    def __init__(self, store: StoreNode, feed: StoreFeed) -> None:
        super().__init__(None, store)
        self._store = store
        self._feed = feed
        store.on_plane = self._on_plane
        self._on_plane(store.plane)

    async def Offer(self, request: kv_pb2.OfferRequest, context: grpc.aio.ServicerContext[Any, Any]) -> kv_pb2.OfferReply:
        try:
            offered = await self._store.offer(
                Offer(
                    key_from_pb(request.holder),
                    request.epoch,
                    layout_from_pb(request.layout),
                    source_from_pb(request.source),
                    [record_from_pb(record) for record in request.records],
                    request.tenant,
                    request.cost_s,
                )
            )
        except TandemError as error:
            await abort(context, error)
        return kv_pb2.OfferReply(taken=offered.taken, known=offered.known, refused=offered.refused)

    async def Changes(
        self, request: kv_pb2.ChangesRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[common_pb2.KvChanges]:
        try:
            async with contextlib.aclosing(self._feed.portions(request.epoch, request.stream)) as portions:
                async for changes in portions:
                    yield changes_to_pb(changes)
        except TandemError as error:
            await abort(context, error)

    def _on_plane(self, plane: StorePlane | None) -> None:
        self.exports = plane.exports if plane is not None else None
