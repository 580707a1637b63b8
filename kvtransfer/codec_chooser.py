"""Chooses codecs pull by pull, and measures what they cost here with the first blocks that have come over a network."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

import numpy as np

from core.blocks import KvSource
from kvtransfer.arena import Blocks
from kvtransfer.choose_codec import CodecCost
from kvtransfer.codec import AUTO, CODECS, LOSSY, RAW
from kvtransfer.codecs import Codecs
from kvtransfer.link_codecs import ENCODING, LinkCodecs
from kvtransfer.transport import PullResult

log = logging.getLogger(__name__)

SAMPLE_BYTES = 2**18  # a few milliseconds of every codec
_CLOSE_S = 5.0


class CodecChooser:
    """Lives on the event loop of its process. `dest` is the arena that pulls land in, `configured` is `transfer.codec`."""

    def __init__(self, configured: str, codecs: Codecs, dest: Blocks) -> None:
        self.lossless = AUTO if configured in LOSSY else configured
        """What blocks are asked for by that must come as they are."""
        self._codecs = codecs
        self._dest = dest
        self._links = LinkCodecs(int(dest.shape[1]))
        self._measuring: asyncio.Task[None] | None = None

    @property
    def costs(self) -> Sequence[CodecCost]:
        """Empty until they have been measured."""
        return self._links.costs

    def choose(self, source: KvSource, transport: str, wanted: str) -> str:
        return self._links.choose(source.worker_id, transport, wanted)

    def observe(self, source: KvSource, transport: str, wanted: str, result: PullResult, dest_blocks: Sequence[int]) -> None:
        """To be told of every pull that went well, while its caller still holds `dest_blocks`."""
        self._links.observe(source.worker_id, transport, result)
        if wanted == AUTO and dest_blocks and transport in ENCODING and self._measuring is None:
            sample = self._dest[list(dest_blocks[: max(1, SAMPLE_BYTES // int(self._dest.shape[1]))])]  # a copy
            self._measuring = asyncio.create_task(self._measure(sample), name="kv-codec-costs")

    async def close(self) -> None:
        if self._measuring is not None:
            await asyncio.wait([self._measuring], timeout=_CLOSE_S)

    async def _measure(self, sample: Blocks) -> None:
        try:
            self._links.costs = await asyncio.to_thread(measure, self._codecs, sample)
        except Exception:  # everything goes raw then
            log.exception("measuring codecs failed")


def measure(codecs: Codecs, sample: Blocks) -> list[CodecCost]:
    """What each lossless codec does to these blocks with one thread of this machine; the other end is taken to be its like."""
    costs = [CodecCost(RAW, False, 1.0)]
    out = np.empty_like(sample[0])
    for name in CODECS:
        codec = None if name in LOSSY else codecs.find(name)
        if codec is None:
            continue
        started = time.perf_counter()
        encoded = [codec.encode(block) for block in sample]
        between = time.perf_counter()
        for data in encoded:
            codec.decode(data, out)
        ended = time.perf_counter()
        size = sample.nbytes
        ratio = sum(data.nbytes for data in encoded) / size
        costs.append(CodecCost(name, False, ratio, size / (between - started), size / (ended - between)))
    return costs
