"""Telling a node that blocks of its came with a wrong digest."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import grpc

from core.blocks import BlockKey, KvSource
from kvtransfer.channels import Channels
from tandem.cancelling import heed_cancellation
from tandem.v1 import kv_pb2

log = logging.getLogger(__name__)

VERIFY_TIMEOUT_S = 5.0  # it reads no more than one slice, or one prompt; nobody waits for it but an end in order


async def complain(channels: Channels, source: KvSource, keys: Sequence[BlockKey]) -> None:
    """The node shall look at these blocks itself and drop what is bad, so that it does not give it out for ever. One that
    does not answer is left alone."""
    if not keys:  # a request without any would mean all that is there
        return
    try:
        await channels.stub(source).Verify(kv_pb2.VerifyRequest(keys=keys), timeout=VERIFY_TIMEOUT_S)
    except (grpc.aio.AioRpcError, asyncio.CancelledError) as error:
        heed_cancellation()
        log.info("%s did not look at its blocks (%s)", source.worker_id, type(error).__name__)
