"""Bytes of blocks from wherever they are: the best transport that works, the next one when it fails, all of it counted.

Hand-offs, blocks held by key and the offers of a store share this one object of a process.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from core.blocks import BlockRecord, KvSource
from core.clock import Clock
from core.errors import DigestMismatchError, LayoutMismatchError, LeaseExpiredError, StaleEpochError, TransferError
from core.request import AttemptKey
from kvtransfer.choose import transport_order
from kvtransfer.codec import RAW
from kvtransfer.codec_chooser import CodecChooser
from kvtransfer.encoding_error import EncodingError
from kvtransfer.transport import PullResult, Transport

log = logging.getLogger(__name__)

DEMOTED_S = 30.0  # a transport that failed with a source is tried last for so long


@dataclass(slots=True)
class FetchStats:
    """Plain numbers, read when metrics are scraped."""

    bytes: Counter[str] = field(default_factory=Counter)  # by transport
    blocks: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    fallbacks: Counter[tuple[str, str]] = field(default_factory=Counter)  # (failed, tried next)
    encoded_blocks: Counter[tuple[str, str]] = field(default_factory=Counter)  # by (transport, codec), raw ones left out
    encoded_bytes: Counter[tuple[str, str]] = field(default_factory=Counter)  # what crossed the link of them
    damaged: Counter[str] = field(default_factory=Counter)  # pulls repeated raw, by codec
    digest_failures: int = 0


class Fetcher:
    """One per process and arena. Any number of fetches at the same time.

    `configured` is `transfer.transport`; `host_id` says whose shared memory can be mapped here. Without `codecs`
    everything goes raw.
    """

    def __init__(
        self,
        transports: Mapping[str, Transport],
        configured: str,
        clock: Clock,
        *,
        host_id: str,
        codecs: CodecChooser | None = None,
    ) -> None:
        self.stats = FetchStats()
        self.host_id = host_id
        self.transports = transports
        self._configured = configured
        self._codecs = codecs
        self._clock = clock
        self._sources: dict[str, KvSource] = {}
        self._heard: dict[str, float] = {}  # when each of these was last used, or said to be alive
        self._demoted: dict[tuple[str, int, str], float] = {}

    def meet(self, source: KvSource) -> None:
        """To be told of a source before anything is fetched from it: what is cached of an older incarnation is dropped.

        Raises StaleEpochError when a newer incarnation of the worker is known here.
        """
        known = self._sources.get(source.worker_id)
        if known is not None and known.epoch > source.epoch:
            raise StaleEpochError(f"{source.worker_id} is of epoch {known.epoch} by now, not of epoch {source.epoch}")
        if known is not None and known.epoch < source.epoch:
            self.forget(known)
        self._sources[source.worker_id] = source
        self._heard[source.worker_id] = self._clock.now()

    def order(self, source: KvSource) -> list[str]:
        """The transports to try for this source, best first. Raises TransferError when none reaches it."""
        now = self._clock.now()
        failing = [n for n in self.transports if self._demoted.get((source.worker_id, source.epoch, n), now) > now]
        return list(transport_order(self._configured, self.transports, self.host_id, source, failing))

    async def open(self, source: KvSource, key: AttemptKey) -> None:
        """Maps or dials ahead of the first fetch, where that takes a while."""
        if self.order(source)[0] in ("shm", "tcp", "collective"):
            await self.fetch(source, key, (), ())

    async def fetch(
        self,
        source: KvSource,
        key: AttemptKey,
        records: Sequence[BlockRecord],
        dest_blocks: Sequence[int],
        codec: str | None = None,
    ) -> PullResult:
        """Fills `dest_blocks` as `Transport.pull` does, by the best transport that works.

        `codec`: what to ask for where there is a network between the ends, AUTO included; None: as configured here, but
        always such that every bit is kept. The result says what the blocks went through.

        One that fails is tried last with this source for a while. Raises what the last one raised, and at once what is
        true over every transport: StaleEpochError, LeaseExpiredError, LayoutMismatchError.
        """
        if source.worker_id in self._heard:
            self._heard[source.worker_id] = self._clock.now()
        order = self.order(source)
        for name, following in zip(order, [*order[1:], None], strict=True):
            try:
                result = await self._pull(name, source, key, records, dest_blocks, codec)
            except (StaleEpochError, LeaseExpiredError, LayoutMismatchError):
                raise
            except TransferError as error:
                self.stats.digest_failures += isinstance(error, DigestMismatchError)
                if following is None:
                    raise
                self._demote(source, name, following, error)
            else:
                self._count(name, result, len(records))
                return result._replace(transport=name)
        raise AssertionError("an order of transports is never empty")

    def forget(self, source: KvSource) -> None:
        """Drops what is cached of an incarnation that is gone."""
        for transport in self.transports.values():
            transport.forget(source)
        if self._sources.get(source.worker_id) == source:
            del self._sources[source.worker_id], self._heard[source.worker_id]
        for place in [p for p in self._demoted if p[:2] == (source.worker_id, source.epoch)]:
            del self._demoted[place]

    def keep(self, alive: Collection[KvSource], patience_s: float) -> None:
        """Forgets the sources that `alive` has not named, and nobody has used, for `patience_s`, and at once those with a newer
        incarnation: memory of a worker that is gone is taken for as long as somebody maps it.

        Not at once all that are missing: a directory that restarted empty names nobody for a while, and forgetting a source
        ends the hand-offs that are under way from it.
        """
        now = self._clock.now()
        newest = {source.worker_id: source.epoch for source in alive}
        for source in list(self._sources.values()):
            epoch = newest.get(source.worker_id)
            if epoch == source.epoch:
                self._heard[source.worker_id] = now
            elif (epoch or 0) > source.epoch or now - self._heard[source.worker_id] >= patience_s:
                self.forget(source)

    async def close(self) -> None:
        """Closes the transports."""
        if self._codecs is not None:
            await self._codecs.close()
        for transport in self.transports.values():
            await transport.close()

    async def _pull(
        self,
        name: str,
        source: KvSource,
        key: AttemptKey,
        records: Sequence[BlockRecord],
        dest_blocks: Sequence[int],
        codec: str | None,
    ) -> PullResult:
        """By one transport. What a codec has spoilt is asked for once more, raw."""
        transport, codecs = self.transports[name], self._codecs
        if codecs is None:
            return await transport.pull(source, key, records, dest_blocks)
        wanted = codec or codecs.lossless
        chosen = codecs.choose(source, name, wanted) if records else RAW
        try:
            result = await transport.pull(source, key, records, dest_blocks, chosen)
        except (EncodingError, DigestMismatchError) as error:
            if chosen == RAW:
                raise
            log.warning("blocks of %s came damaged as %s (%s); asking for them raw", source.worker_id, chosen, error.message)
            self.stats.damaged[chosen] += 1
            self.stats.digest_failures += isinstance(error, DigestMismatchError)
            result = await transport.pull(source, key, records, dest_blocks)
        codecs.observe(source, name, wanted, result, dest_blocks)
        return result

    def _demote(self, source: KvSource, failed: str, following: str, error: TransferError) -> None:
        log.warning("%s failed with %s (%s); going on over %s", failed, source.worker_id, error.message, following)
        self.stats.fallbacks[failed, following] += 1
        self._demoted[source.worker_id, source.epoch, failed] = self._clock.now() + DEMOTED_S

    def _count(self, name: str, result: PullResult, num_blocks: int) -> None:
        if not num_blocks:
            return
        stats = self.stats
        stats.bytes[name] += result.bytes
        stats.blocks[name] += num_blocks
        stats.seconds[name] = stats.seconds.get(name, 0.0) + result.seconds
        if result.codec != RAW:
            stats.encoded_blocks[name, result.codec] += num_blocks
            stats.encoded_bytes[name, result.codec] += result.wire_bytes
