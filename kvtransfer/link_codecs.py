"""Which codec the next pull over a link gets, from what earlier ones took. Deciding code."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from kvtransfer.choose_codec import CodecCost, choose_codec
from kvtransfer.codec import AUTO, RAW
from kvtransfer.transport import PullResult

ENCODING = frozenset({"tcp", "grpc"})
"""Transports with a network between the ends. What shares memory gains nothing from smaller blocks."""
WEIGHT = 0.3  # of the newest pull in a link's rate
PULL_BYTES_MIN = 2**18  # a smaller pull tells of the round trip, not of the rate
RAW_EVERY = 32  # pulls: an encoded one does not tell the link's own rate, so now and then one goes raw
LINKS_MAX = 1024


@dataclass(slots=True)
class _Link:
    bytes_per_s: float
    encoded: int = 0
    """Pulls since the last raw one."""


class LinkCodecs:
    """Rates by (worker, transport), exponentially weighted. `costs` are set when they have been measured."""

    def __init__(self, block_bytes: int) -> None:
        self.costs: Sequence[CodecCost] = ()
        self._block_bytes = block_bytes
        self._links: OrderedDict[tuple[str, str], _Link] = OrderedDict()  # used last at the end

    def choose(self, worker_id: str, transport: str, wanted: str) -> str:
        """`wanted`: a codec, or AUTO: the lossless one with the shortest predicted time, raw until that is known."""
        if transport not in ENCODING:
            return RAW
        if wanted != AUTO:
            return wanted
        link = self._links.get((worker_id, transport))
        if link is None or not self.costs or link.encoded >= RAW_EVERY:
            return RAW
        return choose_codec(self._block_bytes, link.bytes_per_s, self.costs, lossy_allowed=False)

    def observe(self, worker_id: str, transport: str, result: PullResult) -> None:
        """A pull that went well."""
        place = worker_id, transport
        if transport not in ENCODING or result.bytes < PULL_BYTES_MIN or result.seconds <= 0:
            return
        link = self._links.get(place)
        if result.codec != RAW:
            if link is not None:
                link.encoded += 1
            return
        rate = result.bytes / result.seconds
        if link is None:
            link = self._links[place] = _Link(rate)
        link.bytes_per_s += WEIGHT * (rate - link.bytes_per_s)
        link.encoded = 0
        self._links.move_to_end(place)
        while len(self._links) > LINKS_MAX:
            self._links.popitem(last=False)
