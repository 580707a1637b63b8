"""Which codec a link should use: the one with the shortest predicted time. Deciding code."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CodecCost:
    """What a codec does to blocks of one layout here, measured. `ratio`: encoded bytes / plain bytes.

    Both rates are plain bytes per second of the whole end (all threads that may be used); `inf` for nothing to do.
    """

    name: str
    lossy: bool
    ratio: float
    encode_bytes_per_s: float = float("inf")
    decode_bytes_per_s: float = float("inf")


def predicted_s(block_bytes: int, link_bytes_per_s: float, cost: CodecCost, overlapped: bool = False) -> float:
    """Seconds per block: the slowest of encoding, sending and decoding when they run side by side, else their sum."""
    assert block_bytes > 0, "a block has bytes"
    assert link_bytes_per_s > 0, "a link moves bytes"
    stages = (
        block_bytes / cost.encode_bytes_per_s,
        block_bytes * cost.ratio / link_bytes_per_s,
        block_bytes / cost.decode_bytes_per_s,
    )
    return max(stages) if overlapped else sum(stages)


def choose_codec(
    block_bytes: int, link_bytes_per_s: float, costs: Iterable[CodecCost], *, lossy_allowed: bool, overlapped: bool = False
) -> str:
    """The name of the codec with the shortest predicted time among those allowed; the first named wins a draw.

    `link_bytes_per_s` is what the link does when nothing is encoded. Lossy codecs change tokens, so the caller says
    whether they may. Without `overlapped`, a block is encoded, sent and decoded one after the other.
    """
    allowed = [cost for cost in costs if lossy_allowed or not cost.lossy]
    assert allowed, "raw at least is always there"
    return min(allowed, key=lambda cost: predicted_s(block_bytes, link_bytes_per_s, cost, overlapped)).name
