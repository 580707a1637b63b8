"""Ways to make a block smaller for a wire or a disk, by name. The digest of a block is of its plain bytes, never of these.

A codec is bound to a layout, because what it can do depends on what the bytes mean. `raw` and the lossless ones give back
the same bytes; a block that went through a lossy one is another block and must be committed under the salt that names it
(`core.blocks.root_key(…, codec=name)`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from core.blocks import KvLayout
from kvtransfer.arena import Blocks
from kvtransfer.codec import RAW, unknown_codec
from kvtransfer.encoding_error import EncodingError
from kvtransfer.int8 import Int8Codec
from kvtransfer.lossless import PlanesCodec


class Codec(Protocol):
    """Encodes and decodes single blocks of the layout it was made for. Stateless: any thread may call it."""

    @property
    def name(self) -> str: ...

    @property
    def lossy(self) -> bool: ...

    @property
    def encoded_bytes_max(self) -> int:
        """No encoding of any block is longer; a receiver refuses more before it takes memory."""
        ...

    def encode(self, block: Blocks) -> Blocks:
        """`block`: contiguous uint8 [block_bytes], only read. What returns is of its own memory, or `block` itself (raw)."""
        ...

    def decode(self, data: Blocks, out: Blocks) -> None:
        """Fills `out` (contiguous, writable uint8 [block_bytes]) from what `encode` gave.

        Raises EncodingError for anything `encode` cannot have given, as far as its structure tells; `out` is undefined
        then, and never written beyond its end. What only the digest can tell is the digest's to tell.
        """
        ...


class RawCodec:
    name = RAW
    lossy = False

    def __init__(self, layout: KvLayout) -> None:
        self.encoded_bytes_max = layout.block_bytes

    def encode(self, block: Blocks) -> Blocks:
        return block

    def decode(self, data: Blocks, out: Blocks) -> None:
        if data.nbytes != out.nbytes:
            raise EncodingError(f"a raw block of {data.nbytes} bytes for {out.nbytes}")
        np.copyto(out, data)


FACTORIES: dict[str, Callable[[KvLayout], Codec]] = {
    RAW: RawCodec,
    PlanesCodec.name: PlanesCodec,
    Int8Codec.name: Int8Codec,
}


def make_codec(name: str, layout: KvLayout) -> Codec:
    """Raises LayoutMismatchError for a codec this version does not have."""
    factory = FACTORIES.get(name)
    if factory is None:
        raise unknown_codec(FACTORIES, name)
    return factory(layout)


def salt_of(codec: Codec) -> str:
    """What `root_key` takes as its codec: the name of a lossy one, empty for those that keep every bit."""
    return codec.name if codec.lossy else ""


class Codecs:
    """The codecs of one layout, each made when it is first asked for. Without a layout there is `raw` alone.

    Any thread may ask: two that do so at once both make one, and either will do.
    """

    def __init__(self, layout: KvLayout | None = None) -> None:
        self._layout = layout
        self._made: dict[str, Codec] = {}

    def find(self, name: str) -> Codec | None:
        """None for `raw`: nothing is to be done. Raises LayoutMismatchError for a codec that is not here."""
        if name == RAW:
            return None
        if self._layout is None:
            raise unknown_codec([RAW], name)
        codec = self._made.get(name)
        if codec is None:
            codec = self._made[name] = make_codec(name, self._layout)
        return codec
