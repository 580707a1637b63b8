"""Log lines that say whom they are about, and metrics read from state when they are scraped.

Deciding code keeps plain numbers; a collector turns them into samples at scrape time, so nothing on the hot path knows
of Prometheus.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Protocol

from prometheus_client import CollectorRegistry
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from core.errors import ConfigError
from core.histogram import Histogram as Histogram

_REQUEST_BYTES_MAX = 16_384
_REQUEST_TIMEOUT_S = 5.0
_context: ContextVar[tuple[str, ...]] = ContextVar("tandem_log_context", default=())


def configure_logging(level: str, who: str) -> None:
    """Log lines go to standard error, each with the process's name (`who`) and the context of the code that wrote it."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_add_context)
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname).1s {who} %(name)s%(tandem)s %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


@contextmanager
def log_context(**fields: object) -> Iterator[None]:
    """Log lines written inside (tasks started inside included) carry `name=value` of each field."""
    token = _context.set((*_context.get(), *(f"{name}={value}" for name, value in fields.items())))
    try:
        yield
    finally:
        _context.reset(token)


def _add_context(record: logging.LogRecord) -> bool:
    context = _context.get()
    record.tandem = f" [{' '.join(context)}]" if context else ""
    return True


STEP_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
TRANSFER_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 5.0)
TRANSFER_BYTES = tuple(float(2**power) for power in range(11, 35, 2))


def histogram_family(name: str, help_text: str, histograms: Iterable[tuple[Histogram, dict[str, str]]]) -> Metric:
    """One metric of several histograms, told apart by their labels (the same label names for all)."""
    rows = list(histograms)
    names = sorted({label for _, labels in rows for label in labels})
    family = HistogramMetricFamily(name, help_text, labels=names)
    for histogram, labels in rows:
        family.add_metric([labels[label] for label in names], histogram.buckets(), histogram.sum)
    return family


class Metrics(Protocol):
    """A part of the process that can be asked for its samples; called on the asyncio thread."""

    def collect(self) -> Iterable[Metric]: ...


class _Adapter(Collector):
    def __init__(self, source: Metrics) -> None:
        self._source = source

    def collect(self) -> Iterable[Metric]:
        return self._source.collect()


class MetricsServer:
    """`GET /metrics` over plain HTTP: an async context manager, listening inside the block.

    `address` has its port resolved once entered. Raises ConfigError when it cannot listen. Serves a scraper, nothing
    else: one request per connection, small and with a deadline.
    """

    def __init__(self, address: str, sources: Iterable[Metrics]) -> None:
        self.address = address
        self._registry = CollectorRegistry(auto_describe=False)
        for source in sources:
            self._registry.register(_Adapter(source))
        self._server: asyncio.Server | None = None

    def render(self) -> bytes:
        """The exposition text of this moment."""
        return generate_latest(self._registry)

    async def __aenter__(self) -> MetricsServer:
        host, _, port = self.address.rpartition(":")
        try:
            self._server = await asyncio.start_server(self._answer, host, int(port), limit=_REQUEST_BYTES_MAX)
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot listen for metrics on {self.address}: {error}; choose another address") from None
        self.address = f"{host}:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        await self._server.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_REQUEST_TIMEOUT_S):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(self._response(head))
                await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # not a scraper, or one that went away
        finally:
            writer.close()

    def _response(self, head: bytes) -> bytes:
        method, _, rest = head.partition(b" ")
        path = rest.partition(b" ")[0].partition(b"?")[0]
        if path != b"/metrics":
            return _http(404, "Not Found", b"only /metrics is served here\n", "text/plain")
        if method != b"GET":
            return _http(405, "Method Not Allowed", b"only GET is served here\n", "text/plain")
        return _http(200, "OK", self.render(), CONTENT_TYPE_LATEST)


def _http(status: int, reason: str, body: bytes, content_type: str) -> bytes:
    head = f"HTTP/1.1 {status} {reason}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Connection: close\r\n\r\n" + body
